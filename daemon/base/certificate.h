// What an X.509 certificate says of the node that shows it, and whether it may be believed. Pure
// functions over OpenSSL's libcrypto, apart from the clock in verify_certificate(); any thread, any
// input. Texts are PEM.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "daemon/base/result.h"

namespace kvferry {

struct Certificate {
  // The one URI name, which must be a SPIFFE id, else the one DNS name in small letters. Never the
  // common name.
  std::string identity;
  int64_t not_before = 0;  // seconds since 1970
  int64_t not_after = 0;
};

// The first certificate of the text. INVALID_ARGUMENT: BAD_CERTIFICATE if there is none or it is an
// authority's own, CERTIFICATE_IDENTITY if its names make no identity or more than one.
Result<Certificate> read_certificate(std::string_view pem);

// Whether the key is the certificate's (the first one's). INVALID_ARGUMENT BAD_KEY,
// FAILED_PRECONDITION KEY_MISMATCH. A key under a password is a bad one.
Status check_private_key(std::string_view certificate_pem, std::string_view key_pem);

// INVALID_ARGUMENT BAD_CERTIFICATE unless the text holds certificates and nothing broken.
Status check_certificates(std::string_view pem);

// From when to when the certificate of the text is valid that ends last, in seconds since 1970.
// INVALID_ARGUMENT BAD_CERTIFICATE as check_certificates().
struct Validity {
  int64_t not_before = 0;
  int64_t not_after = 0;
};
Result<Validity> last_validity(std::string_view pem);

// What the node does with it in a connection.
enum class CertificateUse : uint8_t { kClient, kServer };

// Whether key usage and extended key usage of the first certificate let it; false for what cannot
// be read.
bool may_be_used(std::string_view pem, CertificateUse use);

// Whether one of `roots` vouches for the first certificate of `pem`, by way of those in `between`,
// for that use. `at_any_time` leaves expiry aside. FAILED_PRECONDITION CERTIFICATE_REFUSED, with
// the reason in OpenSSL's words; INVALID_ARGUMENT BAD_CERTIFICATE.
Status verify_certificate(std::string_view pem, std::string_view between, std::string_view roots,
                          CertificateUse use, bool at_any_time);

// "2026-11-27 22:00:00 UTC".
std::string format_date(int64_t seconds_since_1970);

}  // namespace kvferry
