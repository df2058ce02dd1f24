// Attaches where nobody listens: the library is linked, loads and answers.
#include <kvferry/client.h>

#include <iostream>

int main() {
  const auto client =
      kvferry::client::Client::attach({.socket = "/nonexistent", .name = "consumer"});
  if (client) return 1;
  std::cout << client.error().to_string() << '\n';
  return 0;
}
