// How one configuration key is read and printed; shared by the configuration's own files only.
//
// A Binding joins a key to a member of a Config. Bindings refer to that Config and must not outlive
// it.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/ops/config.h"

namespace kvferry::ops {

// What a source gave: one word or a list of words, and how it was written.
struct RawValue {
  // kFree: from the environment or the command line, where everything is text.
  enum class Form : uint8_t { kString, kInteger, kFloat, kBoolean, kList, kOther, kFree };
  Form form = Form::kOther;
  std::string text;               // all but kList
  std::vector<std::string> list;  // kList
};

struct Binding {
  // Takes the value over; else says what is wrong with it and changes nothing.
  std::function<std::string(const RawValue&)> assign;
  // As TOML.
  std::function<std::string()> print;
};

struct Key {
  std::string name;     // dotted within its section
  std::string comment;  // lines for the default file
  Binding binding;
};

struct Section {
  std::string name;
  std::string comment;
  std::vector<Key> keys;
};

// The whole table but [[socket]], [[peers]] and [ucx], which repeat or are free.
std::vector<Section> config_schema(Config& config);
Section socket_schema(SocketConfig& socket);
Section peer_schema(PeerConfig& peer);

// Why a [ucx] entry is refused; empty if it is not. `key` without the UCX_ prefix.
std::string refuse_ucx(std::string_view key, std::string_view value);

// Everything that needs more than one key, or the machine. Fills in what is derived (node.id,
// grpc_path, rails.binary).
void check_config(LoadedConfig& loaded, const std::string& file);

template <typename E>
struct Choice {
  std::string_view word;
  E value;
};

Binding text_binding(std::string& target);
Binding flag_binding(bool& target);  // true, false
Binding texts_binding(std::vector<std::string>& target);
Binding size_binding(uint64_t& target, uint64_t min, uint64_t max);
Binding duration_binding(Duration& target, Duration min, Duration max);
Binding fraction_binding(double& target);
Binding mode_binding(uint32_t& target);
Binding port_range_binding(PortRange& target);
Binding uids_binding(std::vector<uint32_t>& target);
Binding addresses_binding(std::vector<AddressRule>& target);

std::string toml_quote(std::string_view text);
std::string toml_list(std::span<const std::string> words);
// "" and true if `raw` is one word that a key of text form may take.
bool takes_text(const RawValue& raw);
// A whole number in [min, max]; else what is wrong.
std::string read_integer(const RawValue& raw, uint64_t min, uint64_t max, uint64_t& out);

template <typename T>
Binding count_binding(T& target, T min, T max) {
  return {[&target, min, max](const RawValue& raw) {
            uint64_t value = 0;
            std::string wrong = read_integer(raw, min, max, value);
            if (wrong.empty()) target = static_cast<T>(value);
            return wrong;
          },
          [&target] { return std::to_string(target); }};
}

// `refused`: words that are known but not served by this build.
template <typename E>
Binding choice_binding(E& target, std::vector<Choice<E>> choices,
                       std::vector<std::string_view> refused = {}) {
  auto assign = [&target, choices, refused](const RawValue& raw) -> std::string {
    if (!takes_text(raw)) return "must be a string";
    std::string words;
    for (const auto& choice : choices) {
      if (choice.word == raw.text) {
        target = choice.value;
        return {};
      }
      words.append(words.empty() ? "" : ", ").append(choice.word);
    }
    for (const std::string_view word : refused)
      if (word == raw.text)
        return toml_quote(raw.text) + " is not served by this release (served: " + words + ")";
    return toml_quote(raw.text) + " is none of: " + words;
  };
  auto print = [&target, choices]() -> std::string {
    for (const auto& choice : choices)
      if (choice.value == target) return toml_quote(choice.word);
    return "\"\"";
  };
  return {assign, print};
}

// Whether the peer is plain and may be off loopback.
bool needs_cluster_secret(const PeerConfig& peer);

}  // namespace kvferry::ops
