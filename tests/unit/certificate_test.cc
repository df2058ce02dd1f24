// Whose a certificate is, and who vouches for it.
#include "daemon/base/certificate.h"

#include <openssl/err.h>

#include <catch2/catch.hpp>
#include <ctime>

#include "tests/unit/test_certificates.h"

using namespace kvferry;
using kvferry::testing::KeyPair;
using kvferry::testing::TestAuthority;
using Names = TestAuthority::Names;

namespace {

const TestAuthority& authority() {
  static const TestAuthority one("authority");
  return one;
}

// The identity, or the reason why there is none.
std::string identity_of(const Names& names) {
  const Result<Certificate> read = read_certificate(authority().issue(names).certificate);
  CHECK(ERR_peek_error() == 0);  // nothing is left for others on this thread to stumble over
  return read ? read->identity : read.error().reason;
}

}  // namespace

TEST_CASE("the identity is the one URI name, else the one DNS name") {
  const std::string uri = "spiffe://example.org/kvferry/node-b";
  CHECK(identity_of({.uris = {uri}}) == uri);
  // With a URI the others say nothing.
  CHECK(identity_of({.uris = {uri}, .dns = {"a.example", "b.example"}}) == uri);
  CHECK(identity_of({.dns = {"node-b.example"}}) == "node-b.example");
  CHECK(identity_of({.dns = {"Node-B.Example"}}) == "node-b.example");
}

TEST_CASE("no name, or more than one, is no identity") {
  const std::string none = "CERTIFICATE_IDENTITY";
  CHECK(identity_of({.common_name = "node-b.example"}) == none);
  CHECK(identity_of({.others = {"IP:10.0.0.1", "email:a@example.org"}}) == none);
  CHECK(identity_of({.uris = {"spiffe://example.org/a", "spiffe://example.org/b"}}) == none);
  CHECK(identity_of({.uris = {"spiffe://example.org/a", "spiffe://example.org/a"}}) == none);
  CHECK(identity_of({.uris = {"spiffe://example.org/a", "https://example.org"}}) == none);
  CHECK(identity_of({.dns = {"a.example", "b.example"}}) == none);
  // A URI that is none of a node's is not passed over for the DNS name.
  CHECK(identity_of({.uris = {"https://example.org/a"}, .dns = {"a.example"}}) == none);
}

TEST_CASE("names that could be taken for others are no identities") {
  const std::string none = "CERTIFICATE_IDENTITY";
  for (const std::string& uri :
       {std::string("spiffe://"), std::string("spiffe://example.org"),
        std::string("spiffe://example.org/"), std::string("spiffe:///a"),
        std::string("SPIFFE://example.org/a"), std::string("spiffe://example.org/a b"),
        std::string("spiffe://example.org/a\0b", 23), std::string("spiffe://example.org/a?b"),
        std::string("spiffe://example.org/a%00"), std::string("spiffe://user@example.org/a"),
        "spiffe://example.org/" + std::string(240, 'a')}) {
    INFO(uri);
    CHECK(identity_of({.uris = {uri}}) == none);
  }
  for (const std::string& dns : {std::string("*.example.org"), std::string("a\0.example", 10),
                                 std::string(), std::string(".a"), std::string("a,b")}) {
    INFO(dns);
    CHECK(identity_of({.dns = {dns}}) == none);
  }
}

TEST_CASE("an authority's own certificate and what is no certificate are refused") {
  CHECK(identity_of({.uris = {"spiffe://example.org/a"}, .authority = true}) == "BAD_CERTIFICATE");
  const std::string good = authority().node("spiffe://example.org/a").certificate;
  std::string broken = good;
  broken[broken.size() / 2] = broken[broken.size() / 2] == 'A' ? 'B' : 'A';
  for (const std::string& text :
       {std::string(), std::string("node"), good.substr(0, good.size() / 2),
        good + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}) {
    const Result<Certificate> read = read_certificate(text);
    REQUIRE_FALSE(read);
    CHECK(read.error().reason == "BAD_CERTIFICATE");
    CHECK_FALSE(check_certificates(text));
  }
  CHECK(check_certificates(good + authority().certificate()));
  // A bit in the middle is the signature's affair, or the form's.
  if (read_certificate(broken))
    CHECK_FALSE(
        verify_certificate(broken, {}, authority().certificate(), CertificateUse::kClient, false));
}

TEST_CASE("dates are seconds since 1970") {
  const auto now = static_cast<int64_t>(::time(nullptr));
  const Result<Certificate> read = read_certificate(
      authority().issue({.uris = {"spiffe://e/a"}, .begins = -60, .ends = 7200}).certificate);
  REQUIRE(read);
  CHECK(std::abs(read->not_before - (now - 60)) <= 5);
  CHECK(std::abs(read->not_after - (now + 7200)) <= 5);
  // Of several the one that ends last, wherever it stands.
  const std::string soon = authority().issue({.uris = {"spiffe://e/b"}, .ends = 60}).certificate;
  for (const std::string& text :
       {soon + authority().certificate(), authority().certificate() + soon}) {
    const Result<Validity> last = last_validity(text);
    const Result<Validity> only = last_validity(authority().certificate());
    REQUIRE(last);
    REQUIRE(only);
    CHECK(last->not_after == only->not_after);
    CHECK(last->not_before == only->not_before);
  }
  CHECK(std::abs(last_validity(soon)->not_after - (now + 60)) <= 5);
  CHECK_FALSE(last_validity(""));
  CHECK_FALSE(last_validity("node"));
  CHECK(format_date(0) == "1970-01-01 00:00:00 UTC");
}

TEST_CASE("a key is the certificate's or is refused") {
  const KeyPair a = authority().node("spiffe://e/a");
  const KeyPair b = authority().node("spiffe://e/b");
  CHECK(check_private_key(a.certificate, a.key));
  CHECK(check_private_key(a.certificate + authority().certificate(), a.key));
  CHECK(check_private_key(a.certificate, b.key).error().reason == "KEY_MISMATCH");
  CHECK(check_private_key(a.certificate, a.certificate).error().reason == "BAD_KEY");
  CHECK(check_private_key(a.certificate, "").error().reason == "BAD_KEY");
  CHECK(check_private_key(
            a.certificate,
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
            .error()
            .reason == "BAD_KEY");
}

TEST_CASE("only a root that is believed vouches, for the use, in time") {
  const TestAuthority other("other");
  const TestAuthority between("between", authority());
  const KeyPair node = authority().node("spiffe://e/a");
  const auto verify = [](const std::string& pem, const std::string& middle,
                         const std::string& roots, CertificateUse use = CertificateUse::kClient,
                         bool at_any_time = false) {
    const Status status = verify_certificate(pem, middle, roots, use, at_any_time);
    CHECK(ERR_peek_error() == 0);
    if (!status) CHECK(status.error().reason == "CERTIFICATE_REFUSED");
    return status.has_value();
  };
  const std::string& roots = authority().certificate();
  CHECK(verify(node.certificate, "", roots));
  CHECK(verify(node.certificate, "", other.certificate() + roots));
  CHECK_FALSE(verify(node.certificate, "", other.certificate()));
  CHECK_FALSE(verify(node.certificate, "", ""));
  // What the peer brings along leads to a root, and is none.
  const KeyPair far = between.node("spiffe://e/far");
  CHECK(verify(far.certificate, between.certificate(), roots));
  CHECK(verify(far.certificate, far.certificate + between.certificate(), roots));
  CHECK_FALSE(verify(far.certificate, "", roots));
  CHECK_FALSE(verify(far.certificate, between.certificate() + roots, other.certificate()));
  CHECK(verify(far.certificate, "", between.certificate()));

  const KeyPair old = authority().issue({.uris = {"spiffe://e/a"}, .begins = -7200, .ends = -60});
  CHECK_FALSE(verify(old.certificate, "", roots));
  CHECK(verify(old.certificate, "", roots, CertificateUse::kClient, true));
  CHECK_FALSE(verify(old.certificate, "", other.certificate(), CertificateUse::kClient, true));
  const KeyPair early = authority().issue({.uris = {"spiffe://e/a"}, .begins = 600});
  CHECK_FALSE(verify(early.certificate, "", roots));

  const KeyPair server =
      authority().issue({.uris = {"spiffe://e/a"}, .extended_usage = "serverAuth"});
  CHECK(verify(server.certificate, "", roots, CertificateUse::kServer));
  CHECK_FALSE(verify(server.certificate, "", roots, CertificateUse::kClient));
  CHECK(may_be_used(server.certificate, CertificateUse::kServer));
  CHECK_FALSE(may_be_used(server.certificate, CertificateUse::kClient));
  const KeyPair any = authority().issue({.uris = {"spiffe://e/a"}, .extended_usage = ""});
  CHECK(verify(any.certificate, "", roots, CertificateUse::kServer));
  CHECK(verify(any.certificate, "", roots, CertificateUse::kClient));
  CHECK_FALSE(may_be_used("", CertificateUse::kClient));
}
