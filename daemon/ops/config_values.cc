#include "daemon/ops/config_values.h"

#include <array>
#include <charconv>
#include <cmath>
#include <limits>

namespace kvferry::ops {
namespace {

using Form = RawValue::Form;

struct Unit {
  std::string_view word;
  uint64_t factor;
};

constexpr std::array<Unit, 10> kSizeUnits{{{"TiB", 1024 * kGiB},
                                           {"GiB", kGiB},
                                           {"MiB", kMiB},
                                           {"KiB", kKiB},
                                           {"TB", 1'000'000'000'000},
                                           {"GB", 1'000'000'000},
                                           {"MB", 1'000'000},
                                           {"KB", 1'000},
                                           {"kB", 1'000},
                                           {"B", 1}}};

constexpr std::array<Unit, 6> kTimeUnits{{{"ns", 1},
                                          {"us", 1'000},
                                          {"ms", 1'000'000},
                                          {"s", 1'000'000'000},
                                          {"m", 60'000'000'000},
                                          {"h", 3'600'000'000'000}}};

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

// "12", "1.5": whole part and up to six decimals, times `factor`, without floating point. False on
// anything else and on overflow.
bool scale_decimal(std::string_view number, uint64_t factor, uint64_t& out) {
  const std::size_t point = number.find('.');
  const std::string_view whole = number.substr(0, point);
  uint64_t value = 0;
  const auto [stop, error] = std::from_chars(whole.data(), whole.data() + whole.size(), value);
  if (error != std::errc{} || stop != whole.data() + whole.size() || whole.empty()) return false;
  if (!checked_mul(value, factor, out)) return false;
  if (point == std::string_view::npos) return true;

  const std::string_view decimals = number.substr(point + 1);
  if (decimals.empty() || decimals.size() > 6) return false;
  uint64_t fraction = 0;  // below 10^6; times the largest factor it still fits
  uint64_t divisor = 1;
  for (const char c : decimals) {
    if (!is_digit(c)) return false;
    fraction = fraction * 10 + static_cast<uint64_t>(c - '0');
    divisor *= 10;
  }
  fraction *= factor;
  if (fraction % divisor != 0) return false;  // "0.3B" is no number of bytes
  return checked_add(out, fraction / divisor, out);
}

struct Amount {
  std::string_view number;
  std::string_view unit;
};

Amount split_unit(std::string_view text) {
  std::size_t end = 0;
  while (end < text.size() && (is_digit(text[end]) || text[end] == '.')) ++end;
  std::string_view unit = text.substr(end);
  while (!unit.empty() && unit.front() == ' ') unit.remove_prefix(1);
  return {text.substr(0, end), unit};
}

std::string between(std::string_view low, std::string_view high) {
  std::string out = "must be between ";
  out.append(low).append(" and ").append(high);
  return out;
}

std::vector<std::string> words_of(const RawValue& raw) {
  if (raw.form == Form::kList) return raw.list;
  std::vector<std::string> out;
  std::size_t begin = 0;
  while (begin <= raw.text.size() && !raw.text.empty()) {
    const std::size_t comma = std::min(raw.text.find(',', begin), raw.text.size());
    out.push_back(raw.text.substr(begin, comma - begin));
    begin = comma + 1;
  }
  return out;
}

bool takes_list(const RawValue& raw) {
  return raw.form == Form::kList || raw.form == Form::kFree;
}

}  // namespace

Result<uint64_t> parse_size(std::string_view text) {
  const Amount amount = split_unit(text);
  uint64_t factor = amount.unit.empty() ? 1 : 0;
  for (const Unit& unit : kSizeUnits)
    if (unit.word == amount.unit) factor = unit.factor;
  uint64_t bytes = 0;
  if (factor == 0 || !scale_decimal(amount.number, factor, bytes))
    return invalid("", "BAD_SIZE", toml_quote(text) + " is not a size such as \"256MiB\"");
  return bytes;
}

std::string format_size(uint64_t bytes) {
  for (const Unit& unit : kSizeUnits) {
    if (unit.word.size() != 3) continue;  // the binary ones
    if (bytes != 0 && bytes % unit.factor == 0)
      return std::to_string(bytes / unit.factor) + std::string(unit.word);
  }
  return std::to_string(bytes);
}

Result<Duration> parse_duration(std::string_view text) {
  const Amount amount = split_unit(text);
  uint64_t factor = amount.number == "0" && amount.unit.empty() ? 1 : 0;
  for (const Unit& unit : kTimeUnits)
    if (unit.word == amount.unit) factor = unit.factor;
  uint64_t ns = 0;
  if (factor == 0 || !scale_decimal(amount.number, factor, ns) ||
      ns > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
    return invalid("", "BAD_DURATION", toml_quote(text) + " is not a duration such as \"30s\"");
  return Duration(static_cast<int64_t>(ns));
}

std::string format_duration(Duration duration) {
  const auto ns = static_cast<uint64_t>(duration.count() < 0 ? 0 : duration.count());
  if (ns == 0) return "0s";
  std::string out;
  for (const Unit& unit : kTimeUnits)
    if (ns % unit.factor == 0) out = std::to_string(ns / unit.factor) + std::string(unit.word);
  return out;
}

std::string toml_quote(std::string_view text) {
  static constexpr std::string_view kHex = "0123456789ABCDEF";
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte == 0x7f) {
      out += "\\u00";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string toml_list(std::span<const std::string> words) {
  std::string out = "[";
  for (const std::string& word : words) {
    if (out.size() > 1) out += ", ";
    out += toml_quote(word);
  }
  return out + "]";
}

bool takes_text(const RawValue& raw) {
  return raw.form == Form::kString || raw.form == Form::kFree;
}

std::string read_integer(const RawValue& raw, uint64_t min, uint64_t max, uint64_t& out) {
  if (raw.form != Form::kInteger && raw.form != Form::kFree) return "must be a whole number";
  uint64_t value = 0;
  const char* end = raw.text.data() + raw.text.size();
  const auto [stop, error] = std::from_chars(raw.text.data(), end, value);
  if (error != std::errc{} || stop != end || value < min || value > max)
    return between(std::to_string(min), std::to_string(max));
  out = value;
  return {};
}

Binding text_binding(std::string& target) {
  return {[&target](const RawValue& raw) -> std::string {
            if (!takes_text(raw)) return "must be a string";
            if (raw.text.find('\0') != std::string::npos) return "must not hold a zero byte";
            target = raw.text;
            return {};
          },
          [&target] { return toml_quote(target); }};
}

Binding texts_binding(std::vector<std::string>& target) {
  return {[&target](const RawValue& raw) -> std::string {
            if (!takes_list(raw)) return "must be a list of strings";
            target = words_of(raw);
            return {};
          },
          [&target] { return toml_list(target); }};
}

Binding size_binding(uint64_t& target, uint64_t min, uint64_t max) {
  return {[&target, min, max](const RawValue& raw) -> std::string {
            if (!takes_text(raw) && raw.form != Form::kInteger)
              return "must be a size such as \"256MiB\"";
            const auto bytes = parse_size(raw.text);
            if (!bytes) return bytes.error().message;
            if (*bytes < min || *bytes > max) return between(format_size(min), format_size(max));
            target = *bytes;
            return {};
          },
          [&target] { return toml_quote(format_size(target)); }};
}

Binding duration_binding(Duration& target, Duration min, Duration max) {
  return {[&target, min, max](const RawValue& raw) -> std::string {
            if (!takes_text(raw)) return "must be a duration with its unit, such as \"30s\"";
            const auto duration = parse_duration(raw.text);
            if (!duration) return duration.error().message;
            if (*duration < min || *duration > max)
              return between(format_duration(min), format_duration(max));
            target = *duration;
            return {};
          },
          [&target] { return toml_quote(format_duration(target)); }};
}

Binding flag_binding(bool& target) {
  return {[&target](const RawValue& raw) -> std::string {
            const bool form = raw.form == Form::kBoolean || raw.form == Form::kFree;
            if (!form || (raw.text != "true" && raw.text != "false"))
              return "must be true or false";
            target = raw.text == "true";
            return {};
          },
          [&target] { return target ? "true" : "false"; }};
}

Binding fraction_binding(double& target) {
  return {[&target](const RawValue& raw) -> std::string {
            if (raw.form != Form::kFloat && raw.form != Form::kInteger && raw.form != Form::kFree)
              return "must be a number";
            double value = 0;
            const char* end = raw.text.data() + raw.text.size();
            const auto [stop, error] = std::from_chars(raw.text.data(), end, value);
            if (error != std::errc{} || stop != end || !(value > 0.0 && value <= 1.0))
              return "must be above 0 and at most 1";
            target = value;
            return {};
          },
          [&target] {
            std::array<char, 32> text{};
            const auto end = std::to_chars(text.data(), text.data() + text.size(), target).ptr;
            std::string out(text.data(), end);
            if (out.find_first_of(".e") == std::string::npos) out += ".0";
            return out;
          }};
}

Binding mode_binding(uint32_t& target) {
  return {[&target](const RawValue& raw) -> std::string {
            static const std::string kWrong = "must be a file mode such as \"0660\"";
            uint32_t mode = 0;
            const int base = raw.form == Form::kInteger ? 10 : 8;  // TOML has its own octals
            if (!takes_text(raw) && raw.form != Form::kInteger) return kWrong;
            const char* end = raw.text.data() + raw.text.size();
            const auto [stop, error] = std::from_chars(raw.text.data(), end, mode, base);
            if (error != std::errc{} || stop != end || mode > 0777) return kWrong;
            target = mode;
            return {};
          },
          [&target] {
            std::string digits = "\"0";
            for (int shift = 6; shift >= 0; shift -= 3)
              digits += static_cast<char>('0' + ((target >> shift) & 7U));
            return digits + '"';
          }};
}

Binding port_range_binding(PortRange& target) {
  return {[&target](const RawValue& raw) -> std::string {
            static const std::string kWrong = "must be \"first-last\", a port, or \"\" for any";
            if (!takes_text(raw) && raw.form != Form::kInteger) return kWrong;
            if (raw.text.empty() || raw.text == "0") {
              target = {};
              return {};
            }
            const std::size_t dash = raw.text.find('-');
            PortRange range;
            auto read = [](std::string_view text, uint16_t& port) {
              const auto [stop, error] =
                  std::from_chars(text.data(), text.data() + text.size(), port);
              return error == std::errc{} && stop == text.data() + text.size() && port != 0;
            };
            if (!read(std::string_view(raw.text).substr(0, dash), range.first)) return kWrong;
            range.last = range.first;
            if (dash != std::string::npos &&
                !read(std::string_view(raw.text).substr(dash + 1), range.last))
              return kWrong;
            if (range.last < range.first) return "ends before it begins";
            target = range;
            return {};
          },
          [&target]() -> std::string {
            if (target.any()) return "\"\"";
            return toml_quote(std::to_string(target.first) + "-" + std::to_string(target.last));
          }};
}

Binding uids_binding(std::vector<uint32_t>& target) {
  return {[&target](const RawValue& raw) -> std::string {
            if (!takes_list(raw)) return "must be a list of user ids";
            std::vector<uint32_t> out;
            for (const std::string& word : words_of(raw)) {
              uint64_t uid = 0;
              const std::string wrong = read_integer({Form::kFree, word, {}}, 0,
                                                     std::numeric_limits<uint32_t>::max() - 1, uid);
              if (!wrong.empty()) return toml_quote(word) + " is not a user id";
              out.push_back(static_cast<uint32_t>(uid));
            }
            target = std::move(out);
            return {};
          },
          [&target] {
            std::string out = "[";
            for (const uint32_t uid : target)
              out.append(out.size() > 1 ? ", " : "").append(std::to_string(uid));
            return out + "]";
          }};
}

Binding addresses_binding(std::vector<AddressRule>& target) {
  return {[&target](const RawValue& raw) -> std::string {
            if (!takes_list(raw)) return "must be a list of addresses, networks or host names";
            std::vector<AddressRule> out;
            for (const std::string& word : words_of(raw)) {
              auto rule = parse_address_rule(word);
              if (!rule) return rule.error().message;
              out.push_back(std::move(*rule));
            }
            target = std::move(out);
            return {};
          },
          [&target] {
            std::vector<std::string> words;
            for (const AddressRule& rule : target) words.push_back(rule.to_string());
            return toml_list(words);
          }};
}

}  // namespace kvferry::ops
