#include "client/bench/plot.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>

namespace kvferry::bench {
namespace {

constexpr double kWidth = 860, kHeight = 520;
constexpr double kLeft = 80, kRight = 190, kTop = 70, kBottom = 70;
constexpr const char* kColours[] = {"#1f5fa8", "#c1440e", "#2e8540", "#7b3fa0",
                                    "#8a6d00", "#00797a", "#b0236b", "#555555"};

// One logarithmic axis, from a value to a place on the page.
struct Axis {
  double low = std::numeric_limits<double>::infinity();
  double high = 0;
  double from = 0;
  double to = 0;

  void include(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  // Outward to what `ticks` of this base need.
  void widen(double base) {
    if (high <= 0) low = high = 1;
    low = std::pow(base, std::floor(std::log(low) / std::log(base) + 1e-9));
    high = std::pow(base, std::ceil(std::log(high) / std::log(base) - 1e-9));
    if (high <= low) high = low * base;
  }
  double place(double value) const {
    return from + (to - from) * std::log(value / low) / std::log(high / low);
  }
};

template <typename... Args>
void append(std::string& out, const char* format, Args... args) {
  char buffer[512];
  std::snprintf(buffer, sizeof buffer, format, args...);
  out += buffer;
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '<')
      out += "&lt;";
    else if (c == '&')
      out += "&amp;";
    else
      out += c;
  }
  return out;
}

void text(std::string& out, double x, double y, const char* attributes, const std::string& words) {
  append(out, "<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, attributes);
  out += escaped(words) + "</text>\n";
}

bool drawable(const std::pair<double, double>& point) {
  return point.first > 0 && point.second > 0;
}

void draw_axes(std::string& out, const Plot& plot, const Axis& x, const Axis& y) {
  const double step = plot.x_in_powers_of_two ? 2 : 10;
  const double count = std::log(x.high / x.low) / std::log(step);
  const double every = std::ceil(count / 10) < 1 ? 1 : std::ceil(count / 10);
  for (double i = 0; i <= count + 1e-6; i += every) {
    const double value = x.low * std::pow(step, i);
    append(out, "<path class=\"grid\" d=\"M%.1f %.1fV%.1f\"/>\n", x.place(value), y.from, y.to);
    text(
        out, x.place(value), y.from + 20, "text-anchor=\"middle\"",
        plot.x_in_powers_of_two ? binary_text(value) : [&] {
          char buffer[32];
          std::snprintf(buffer, sizeof buffer, "%g", value);
          return std::string(buffer);
        }());
  }
  for (double decade = y.low; decade <= y.high * 1.0001; decade *= 10) {
    for (const double part : {1.0, 2.0, 5.0}) {
      const double value = decade * part;
      if (value > y.high * 1.0001) break;
      append(out, "<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/>\n", x.from, y.place(value), x.to);
      char buffer[32];
      std::snprintf(buffer, sizeof buffer, "%g", value);
      text(out, x.from - 8, y.place(value) + 4, "text-anchor=\"end\"", buffer);
    }
  }
  append(out, "<path class=\"axis\" d=\"M%.1f %.1fV%.1fH%.1f\"/>\n", x.from, y.to, y.from, x.to);
  text(out, (x.from + x.to) / 2, kHeight - 22, "text-anchor=\"middle\"", plot.x_title);
  append(out, "<g transform=\"translate(20 %.1f) rotate(-90)\">", (y.from + y.to) / 2);
  text(out, 0, 0, "text-anchor=\"middle\"", plot.y_title);
  out += "</g>\n";
}

}  // namespace

std::string binary_text(double value) {
  constexpr const char* kSuffixes[] = {"", " Ki", " Mi", " Gi", " Ti"};
  std::size_t suffix = 0;
  while (value >= 1024 && std::fmod(value, 1024) == 0 && suffix + 1 < std::size(kSuffixes)) {
    value /= 1024;
    ++suffix;
  }
  char buffer[48];
  std::snprintf(buffer, sizeof buffer, "%.10g%s", value, kSuffixes[suffix]);
  return buffer;
}

std::string to_svg(const Plot& plot) {
  Axis x;
  Axis y;
  for (const PlotLine& line : plot.lines) {
    for (const auto& point : line.points) {
      if (!drawable(point)) continue;
      x.include(point.first);
      y.include(point.second);
    }
  }
  x.widen(plot.x_in_powers_of_two ? 2 : 10);
  y.widen(10);
  x.from = kLeft;
  x.to = kWidth - kRight;
  y.from = kHeight - kBottom;
  y.to = kTop;

  std::string out;
  append(out,
         "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" "
         "font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n"
         "<style>.grid{stroke:#ddd;fill:none}.axis{stroke:#222;fill:none}"
         ".line{fill:none;stroke-width:2}</style>\n"
         "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
         kWidth, kHeight);
  text(out, kLeft, 28, "font-size=\"16\"", plot.title);
  text(out, kLeft, 48, "fill=\"#666\"", plot.subtitle);
  draw_axes(out, plot, x, y);

  // Names stand at the lines' ends, pushed apart where they would cover each other.
  struct Label {
    double wanted;
    std::size_t line;
  };
  std::vector<Label> labels;
  for (std::size_t i = 0; i < plot.lines.size(); ++i) {
    const char* colour = kColours[i % std::size(kColours)];
    std::string path;
    double last = 0;
    for (const auto& point : plot.lines[i].points) {
      if (!drawable(point)) continue;
      last = y.place(point.second);
      append(path, "%c%.1f %.1f", path.empty() ? 'M' : 'L', x.place(point.first), last);
      append(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x.place(point.first),
             last, colour);
    }
    if (path.empty()) continue;
    append(out, "<path class=\"line\" stroke=\"%s\" d=\"", colour);
    out += path + "\"/>\n";
    labels.push_back({last, i});
  }
  std::sort(labels.begin(), labels.end(),
            [](const Label& a, const Label& b) { return a.wanted < b.wanted; });
  double lowest = kTop;
  for (const Label& label : labels) {
    const double at = std::max(label.wanted, lowest);
    lowest = at + 16;
    text(out, x.to + 10, at + 4,
         (std::string("fill=\"") + kColours[label.line % std::size(kColours)] + "\"").c_str(),
         plot.lines[label.line].name);
  }
  out += "</svg>\n";
  return out;
}

}  // namespace kvferry::bench
