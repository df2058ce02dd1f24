// Where live views go: drawn over each other on a terminal, one after the other elsewhere.
#pragma once

#include <string>

namespace kvferry::ctl {

class Screen {
 public:
  Screen();  // of standard output
  // Cut to the terminal's size, so that nothing scrolls; else followed by an empty line.
  void show(const std::string& text) const;

 private:
  bool terminal_ = false;
};

// What fits: the first `rows` lines, of each the first `columns` characters of UTF-8.
std::string cut(const std::string& text, std::size_t rows, std::size_t columns);

}  // namespace kvferry::ctl
