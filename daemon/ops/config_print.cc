// The commented default file, made from the same table that reads it.
#include "daemon/ops/config_values.h"

namespace kvferry::ops {
namespace {

void print_comment(std::string& out, std::string_view comment) {
  while (!comment.empty()) {
    const std::size_t end = std::min(comment.find('\n'), comment.size());
    out.append("# ").append(comment.substr(0, end)).append("\n");
    comment.remove_prefix(std::min(end + 1, comment.size()));
  }
}

// `lead` stands before every line of an example that is not in force.
void print_section(std::string& out, const Section& section, bool repeats, std::string_view lead) {
  out += "\n";
  print_comment(out, section.comment);
  out.append(lead).append(repeats ? "[[" : "[").append(section.name).append(repeats ? "]]" : "]");
  out += "\n";
  for (const Key& key : section.keys) {
    print_comment(out, key.comment);
    out.append(lead).append(key.name).append(" = ").append(key.binding.print()).append("\n");
  }
}

}  // namespace

std::string default_config_text() {
  std::string out =
      "# kvferryd's configuration, with every key at its default.\n"
      "#\n"
      "# A key may also be given by the environment as KVFERRY_SECTION_KEY "
      "(KVFERRY_LOG_LEVEL=debug)\n"
      "# or on the command line as --set section.key=value, which wins over the environment, "
      "which\n"
      "# wins over this file. [[socket]] and [[peers]] can be given here only. Unknown keys are\n"
      "# errors: \"kvferryd --config FILE --check-config\" tells all of them. Sizes take B, KiB, "
      "MiB,\n"
      "# GiB, TiB; durations ns, us, ms, s, m, h. Changes count from the next start on,\n"
      "# those of [[peers]] and log.level from SIGHUP on.\n"
      "\n"
      "config_version = 1\n";
  Config config;
  PeerConfig example;
  example.identity = "node-b";
  example.addresses = {*parse_address_rule("10.0.0.2"), *parse_address_rule("10.1.0.0/16:7400")};

  for (const Section& section : config_schema(config)) {
    print_section(out, section, false, "");
    if (section.name == "log") print_section(out, socket_schema(config.sockets[0]), true, "");
    if (section.name == "peer") print_section(out, peer_schema(example), true, "#");
    if (section.name == "rails") {
      out += "\n";
      print_comment(
          out,
          "Settings handed to UCX, without the UCX_ in front. What the daemon's safety rests\n"
          "on (transports, protocol, error handling, ports) is not taken from here. UCX\n"
          "accepts misspelt names silently; \"kvferryctl rails\" shows what is in force.");
      out += "[ucx]\n#TCP_TX_SEG_COUNT = \"64\"\n";
    }
  }
  return out;
}

}  // namespace kvferry::ops
