#include "client/ctl/table.h"

#include <algorithm>
#include <array>
#include <cstdio>

namespace kvferry::ctl {
namespace {

template <typename... Args>
std::string format(const char* pattern, Args... args) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), pattern, args...);
  return text.data();
}

}  // namespace

std::string printable(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return text;
}

Format plain(const char* key) {
  return [key](const Json& row) -> std::string {
    const Json& value = row.at(key);
    if (value.is_null()) return "-";
    if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
    if (value.is_string()) {
      const std::string text = printable(value.get<std::string>());
      return text.empty() ? "-" : text;
    }
    return value.dump();
  };
}
Format bytes(const char* key) {
  return [key](const Json& row) { return human_bytes(row.at(key).get<double>()); };
}
Format duration(const char* key) {
  return [key](const Json& row) -> std::string {
    return row.at(key).is_null() ? "-" : human_duration(row.at(key).get<double>());
  };
}

Format rate(const char* key) {
  return [key](const Json& row) -> std::string {
    return row.at(key).is_null() ? "-" : human_bytes(row.at(key).get<double>()) + "/s";
  };
}

std::string table(const Json& rows, const std::vector<Column>& columns, const char* none) {
  if (rows.empty()) return std::string(none) + "\n";
  std::vector<std::vector<std::string>> cells(1);
  for (const Column& column : columns) cells[0].push_back(column.title);
  for (const Json& row : rows) {
    cells.emplace_back();
    for (const Column& column : columns) cells.back().push_back(column.format(row));
  }
  std::vector<std::size_t> widths(columns.size());
  for (const auto& line : cells)
    for (std::size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  std::string out;
  for (const auto& line : cells) {
    std::string text;
    for (std::size_t i = 0; i < line.size(); ++i) {
      const std::string pad(widths[i] - line[i].size(), ' ');
      if (i > 0) text += "  ";
      text += columns[i].right ? pad + line[i] : line[i] + pad;
    }
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + "\n";
  }
  return out;
}

std::string percent(double part, double whole) {
  return whole > 0 ? format("%.0f%%", 100.0 * part / whole) : "-";
}

std::string human_bytes(double value) {
  static constexpr std::array<const char*, 5> kUnits{"B", "KiB", "MiB", "GiB", "TiB"};
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return format(unit == 0 || value >= 100 ? "%.0f %s" : "%.1f %s", value, kUnits.at(unit));
}

std::string human_duration(double seconds) {
  if (seconds < 1e-3) return format("%.0fus", seconds * 1e6);
  if (seconds < 1) return format("%.0fms", seconds * 1e3);
  if (seconds < 60) return format("%.1fs", seconds);
  const auto whole = static_cast<long long>(seconds);
  if (whole < 3600) return format("%lldm%02llds", whole / 60, whole % 60);
  if (whole < 86400) return format("%lldh%02lldm", whole / 3600, whole / 60 % 60);
  return format("%lldd%02lldh", whole / 86400, whole / 3600 % 24);
}

}  // namespace kvferry::ctl
