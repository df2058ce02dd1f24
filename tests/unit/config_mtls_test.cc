// The configuration's part of mutual TLS.
#include "tests/unit/config_support.h"
#include "tests/unit/test_certificates.h"

using namespace kvferry;
using namespace kvferry::ops;

namespace {

// The three files of mode mtls, of an authority of their own.
struct MtlsFiles {
  kvferry::testing::TestAuthority authority{"authority"};
  const Scratch scratch;
  std::string listener_mode = "mtls";
  std::string more;

  std::string write(const std::string& name, const std::string& text, mode_t mode = 0600) const {
    return scratch.write(name, text, mode);
  }
  LoadedConfig load(const std::string& certificate, const std::string& key,
                    const std::string& roots, std::vector<std::string> sets = {}) const {
    const std::string text =
        "config_version = 1\n[peer]\nmode = \"" + listener_mode +
        "\"\nlisten = \"10.0.0.1:7400\"\n" +
        (certificate.empty() ? "" : "certificate_file = \"" + certificate + "\"\n") +
        (key.empty() ? "" : "key_file = \"" + key + "\"\n") +
        (roots.empty() ? "" : "ca_file = \"" + roots + "\"\n") + more;
    return load_config({scratch.write("kvferry.toml", text), std::move(sets), {}});
  }
  LoadedConfig load(const kvferry::testing::KeyPair& pair,
                    std::vector<std::string> sets = {}) const {
    return load(write("cert", pair.certificate), write("key", pair.key),
                write("roots", authority.certificate()), std::move(sets));
  }
  LoadedConfig issue(const kvferry::testing::TestAuthority::Names& names) const {
    return load(authority.issue(names));
  }
};

}  // namespace

TEST_CASE("mode mtls takes the node's id from its certificate, and needs no cluster secret") {
  MtlsFiles files;
  files.more =
      "[[peers]]\nidentity = \"spiffe://t/b\"\nmode = \"mtls\"\naddresses = "
      "[\"10.0.0.0/8\"]\n";
  const auto pair = files.authority.node("spiffe://t/a");
  const LoadedConfig loaded = files.load(pair);
  INFO(all_of(loaded.problems) << all_of(loaded.warnings));
  REQUIRE(loaded.ok());
  CHECK(loaded.warnings.empty());
  CHECK(loaded.config.node.id == "spiffe://t/a");
  CHECK(loaded.config.peers[0].mode == PeerMode::kMtls);
  CHECK(files.load(pair, {"node.id=spiffe://t/a"}).ok());
  CHECK(has_problem(files.load(pair, {"node.id=b"}), "node.id", "\"spiffe://t/a\"'s: leave it"));
  CHECK(files.issue({.dns = {"Node-A.example"}}).config.node.id == "node-a.example");
}

TEST_CASE("each file of mode mtls that is no good is refused with its key and its name") {
  const MtlsFiles files;
  const auto good = files.authority.node("spiffe://t/a");
  const std::string certificate = files.write("good.pem", good.certificate, 0644);
  const std::string key = files.write("good.key", good.key);
  const std::string roots = files.write("good.ca", files.authority.certificate(), 0644);
  REQUIRE(files.load(certificate, key, roots).ok());

  const LoadedConfig none = files.load("", "", "");
  for (const char* name : {"peer.certificate_file", "peer.key_file", "peer.ca_file"})
    CHECK(has_problem(none, name, "must be given for mode mtls"));
  const std::string lost = files.scratch.path() + "/lost";
  CHECK(
      has_problem(files.load(lost, key, roots), "peer.certificate_file", lost + ": No such file"));
  CHECK(
      has_problem(files.load(certificate, lost, roots), "peer.key_file", lost + ": No such file"));
  CHECK(has_problem(files.load(certificate, key, lost), "peer.ca_file", lost + ": No such file"));
  CHECK(has_problem(files.load(certificate, files.scratch.path(), roots), "peer.key_file",
                    "not a regular file"));

  for (const mode_t mode : {0604U, 0602U, 0644U, 0620U})
    CHECK(has_problem(files.load(certificate, files.write("open.key", good.key, mode), roots),
                      "peer.key_file", "open.key: may be read or written by others"));
  const auto other = files.authority.node("spiffe://t/b");
  CHECK(has_problem(files.load(certificate, files.write("other.key", other.key), roots),
                    "peer.key_file", "other.key: is not the certificate's key"));
  CHECK(has_problem(files.load(certificate, files.write("no.key", "secret words"), roots),
                    "peer.key_file", "no.key: holds no private key"));
  CHECK(has_problem(files.load(files.write("no.pem", "words"), key, roots), "peer.certificate_file",
                    "no.pem: holds no certificate"));
  CHECK(has_problem(files.load(certificate, key, files.write("no.ca", "")), "peer.ca_file",
                    "no.ca: holds no certificate"));
  // Nothing of a key is ever told.
  const LoadedConfig told = files.load(certificate, files.write("no.key", "secret words"), roots);
  CHECK(all_of(told.problems).find("secret words") == std::string::npos);
  // All at once.
  CHECK(files.load(lost, lost, lost).problems.size() == 3);
}

TEST_CASE("a certificate that peers would not take is refused at start") {
  const MtlsFiles files;
  const std::string a = "spiffe://t/a";
  const auto refuses = [&](const kvferry::testing::TestAuthority::Names& names,
                           const std::string& words) {
    return has_problem(files.issue(names), "peer.certificate_file", words);
  };
  CHECK(refuses({.uris = {a, "spiffe://t/b"}}, "2 URI names"));
  CHECK(refuses({.dns = {"a.example", "b.example"}}, "2 DNS names"));
  CHECK(refuses({.common_name = "a.example"}, "common name does not count"));
  CHECK(refuses({.uris = {a}, .begins = -7200, .ends = -60}, "has expired, on 20"));
  CHECK(refuses({.uris = {a}, .begins = 600}, "is not valid before 20"));
  CHECK(refuses({.uris = {a}, .extended_usage = "serverAuth"}, "by a TLS client"));
  CHECK(refuses({.uris = {a}, .extended_usage = "clientAuth"}, "by a TLS server"));
  CHECK(refuses({.uris = {a}, .authority = true}, "authority's own"));
  CHECK(files.issue({.uris = {a}, .extended_usage = ""}).ok());
}

TEST_CASE("what mode mtls makes doubtful is warned about") {
  MtlsFiles files;
  const auto pair = files.authority.node("spiffe://t/a");
  const kvferry::testing::TestAuthority other("other");
  const auto warns = [](const LoadedConfig& loaded, const std::string& key,
                        const std::string& words) {
    INFO(all_of(loaded.problems));
    CHECK(loaded.ok());
    return std::any_of(loaded.warnings.begin(), loaded.warnings.end(), [&](const auto& warning) {
      return warning.key == key && warning.message.find(words) != std::string::npos;
    });
  };
  const std::string certificate = files.write("a.pem", pair.certificate);
  const std::string key = files.write("a.key", pair.key);
  CHECK(warns(files.load(certificate, key, files.write("ca", other.certificate())), "peer.ca_file",
              "does not vouch for peer.certificate_file"));
  files.more = "[[peers]]\nidentity = \"b\"\naddresses = [\"127.0.0.1\"]\n";
  CHECK(warns(files.load(pair), "peers[0].mode", "cannot dial this node"));
  // A listener off loopback still needs the secret.
  files.listener_mode = "plain";
  CHECK(has_problem(files.load(pair), "peer.listen", "needs peer.cluster_secret_file"));
  CHECK(warns(files.load(pair, {"peer.listen=127.0.0.1:0"}), "peer.certificate_file",
              "are not used"));
  CHECK(files.load(pair, {"peer.listen=127.0.0.1:0"}).config.node.id != "spiffe://t/a");
}
