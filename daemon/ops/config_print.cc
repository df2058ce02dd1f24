// The commented default file and the values in force, made from the same table that reads them.
#include <algorithm>

#include "daemon/ops/config_values.h"
#include "daemon/ops/reload.h"

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
    if (is_reloadable(section.name + "." + key.name)) out += "# A reload takes it over.\n";
    out.append(lead).append(key.name).append(" = ").append(key.binding.print()).append("\n");
  }
}

// Sections as the default file has them, with all entries of those that repeat.
std::vector<std::pair<Section, std::string>> all_sections(Config& config) {
  std::vector<std::pair<Section, std::string>> out;
  const auto entry = [](std::size_t index) { return "[" + std::to_string(index) + "]"; };
  for (Section& section : config_schema(config)) {
    const std::string name = section.name;
    out.emplace_back(std::move(section), "");
    if (name == "log")
      for (std::size_t i = 0; i < config.sockets.size(); ++i)
        out.emplace_back(socket_schema(config.sockets[i]), entry(i));
    if (name == "peer")
      for (std::size_t i = 0; i < config.peers.size(); ++i)
        out.emplace_back(peer_schema(config.peers[i]), entry(i));
    if (name != "rails") continue;
    Section ucx{"ucx", "", {}};
    for (auto& [key, value] : config.ucx) ucx.keys.push_back({key, "", text_binding(value)});
    if (!ucx.keys.empty()) out.emplace_back(std::move(ucx), "");
  }
  return out;
}

// Behind a "#": a path may hold anything.
std::string one_line(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return text;
}

}  // namespace

std::vector<EffectiveValue> effective_values(Config config, const Places& places) {
  std::vector<EffectiveValue> out;
  for (const auto& [section, entry] : all_sections(config)) {
    for (const Key& key : section.keys) {
      EffectiveValue& row = out.emplace_back();
      row.section = section.name;
      row.entry = entry;
      row.key = key.name;
      row.value = key.binding.print();
      const auto place = places.find(row.path());
      row.origin = place == places.end() ? "default" : place->second.origin();
    }
  }
  return out;
}

std::string effective_config_text(const std::vector<EffectiveValue>& values) {
  std::string out = "config_version = 1\n";
  const EffectiveValue* before = nullptr;
  for (const EffectiveValue& row : values) {
    if (before == nullptr || row.section != before->section || row.entry != before->entry)
      out.append(row.entry.empty() ? "\n[" : "\n[[")
          .append(row.section)
          .append(row.entry.empty() ? "]\n" : "]]\n");
    out.append(row.key).append(" = ").append(row.value);
    out.append("  # ").append(one_line(row.origin)).append("\n");
    before = &row;
  }
  return out;
}

std::string default_config_text() {
  std::string out =
      "# kvferryd's configuration, with every key at its default.\n"
      "#\n"
      "# A key may also be given in conf.d/*.toml beside this file, by the environment as\n"
      "# KVFERRY_SECTION_KEY (KVFERRY_LOG_LEVEL=debug), or on the command line as\n"
      "# --set section.key=value; each wins over those before it, and in conf.d the later name.\n"
      "# [[socket]] and [[peers]] can be given in files only, where they add up: one with the "
      "path\n"
      "# or identity of an earlier file's takes its place, an empty list (peers = []) forgets "
      "them.\n"
      "# Unknown keys are errors: \"kvferryd --config FILE --check-config\" tells all of them,\n"
      "# --print-config what is in force and where it comes from. Sizes take B, KiB, MiB, GiB, "
      "TiB;\n"
      "# durations ns, us, ms, s, m, h. Changes count from the next start on, those of [[peers]] "
      "and\n"
      "# of keys that say so from a reload on: SIGHUP, or kvferryctl reload.\n"
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
