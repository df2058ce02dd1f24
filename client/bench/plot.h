// A line chart as SVG: both axes logarithmic, every line labelled. No dependency.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace kvferry::bench {

struct PlotLine {
  std::string name;
  std::vector<std::pair<double, double>> points;  // positive; others are left out
};

struct Plot {
  std::string title;
  std::string subtitle;
  std::string x_title;
  std::string y_title;
  bool x_in_powers_of_two = false;  // ticks such as "4 Ki", else powers of ten
  std::vector<PlotLine> lines;
};

// The file's text.
std::string to_svg(const Plot& plot);

// 4096 -> "4 Ki", 1000 -> "1000".
std::string binary_text(double value);

}  // namespace kvferry::bench
