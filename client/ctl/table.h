// Tables for people, out of rows of JSON. Pure functions.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace kvferry::ctl {

using Json = nlohmann::ordered_json;
using Format = std::function<std::string(const Json& row)>;

struct Column {
  std::string title;
  Format format;
  bool right = false;
};

// The row's value under `key`: as it is, as a size, as a duration in seconds, as bytes a second.
// Absent values are null.
Format plain(const char* key);
Format bytes(const char* key);
Format duration(const char* key);
Format rate(const char* key);

// `none` stands for a table without rows.
std::string table(const Json& rows, const std::vector<Column>& columns, const char* none);

// Nothing that a daemon tells may move the terminal's cursor.
std::string printable(std::string text);
std::string percent(double part, double whole);
std::string human_bytes(double bytes);       // "1.5 GiB"
std::string human_duration(double seconds);  // "2m05s", "340ms"

}  // namespace kvferry::ctl
