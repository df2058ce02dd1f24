// Certificates for tests, good ones and bad ones. PEM texts; any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace kvferry::testing {

struct KeyPair {
  std::string certificate;  // the node's alone
  std::string key;
};

class TestAuthority {
 public:
  struct Names {
    std::vector<std::string> uris = {};
    std::vector<std::string> dns = {};
    std::vector<std::string> others = {};  // as OpenSSL writes them: "IP:10.0.0.1"
    std::string common_name = "nobody";
    // Seconds from now.
    int64_t begins = -3600;
    int64_t ends = 3600;
    std::string extended_usage = "serverAuth,clientAuth";  // empty: none is said
    bool authority = false;
  };

  explicit TestAuthority(const std::string& name);
  ~TestAuthority();
  // One that `parent` vouches for.
  TestAuthority(const std::string& name, const TestAuthority& parent);
  TestAuthority(const TestAuthority&) = delete;
  TestAuthority& operator=(const TestAuthority&) = delete;

  const std::string& certificate() const;
  KeyPair issue(const Names& names) const;
  KeyPair node(const std::string& uri) const {
    Names names;
    names.uris = {uri};
    return issue(names);
  }

 private:
  struct Parts;
  const std::unique_ptr<Parts> parts_;
};

}  // namespace kvferry::testing
