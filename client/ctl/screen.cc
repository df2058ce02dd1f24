#include "client/ctl/screen.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <iostream>

namespace kvferry::ctl {
namespace {

// From the corner, and nothing after it.
constexpr const char* kHome = "\033[H";
constexpr const char* kClearLine = "\033[K";
constexpr const char* kClearBelow = "\033[J";

}  // namespace

std::string cut(const std::string& text, std::size_t rows, std::size_t columns) {
  std::string out;
  std::size_t row = 0;
  std::size_t column = 0;
  for (const char c : text) {
    if (row == rows) break;
    if (c == '\n') {
      out += c;
      ++row;
      column = 0;
      continue;
    }
    const bool continues = (static_cast<unsigned char>(c) & 0xc0U) == 0x80;
    if (!continues) ++column;
    if (column <= columns) out += c;
  }
  return out;
}

Screen::Screen() : terminal_(::isatty(STDOUT_FILENO) == 1) {}

void Screen::show(const std::string& text) const {
  if (!terminal_) {
    std::cout << text << "\n" << std::flush;
    return;
  }
  winsize size{};
  if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_row == 0 || size.ws_col == 0)
    size = {24, 80, 0, 0};
  // The last row stays free, for a line break there would scroll; so does the last column, for what
  // clears the rest of a line there would clear its character.
  std::string out = kHome;
  for (const char c : cut(text, size.ws_row - 1U, size.ws_col - 1U)) {
    if (c == '\n') out += kClearLine;
    out += c;
  }
  std::cout << out << kClearBelow << std::flush;
}

}  // namespace kvferry::ctl
