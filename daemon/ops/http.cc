#include "daemon/ops/http.h"

#include <arpa/inet.h>
#include <civetweb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <future>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string_view>
#include <thread>
#include <utility>

namespace kvferry::ops {
namespace {

constexpr const char* kText = "text/plain; version=0.0.4; charset=utf-8";
constexpr const char* kJson = "application/json";

std::string status_line(int code) {
  switch (code) {
    case 200:
      return "200 OK";
    case 404:
      return "404 Not Found";
    case 405:
      return "405 Method Not Allowed";
    case 503:
      return "503 Service Unavailable";
    default:
      return "500 Internal Server Error";
  }
}

int answer(mg_connection* connection, int code, const char* type, std::string_view body) {
  const std::string_view method(mg_get_request_info(connection)->request_method);
  std::string out = "HTTP/1.1 " + status_line(code) + "\r\nContent-Type: " + type +
                    "\r\nContent-Length: " + std::to_string(body.size()) +
                    "\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n";
  if (method != "HEAD") out.append(body);
  mg_write(connection, out.data(), out.size());
  return code;
}

std::string to_json(const HealthReport& report) {
  nlohmann::ordered_json json;
  json["status"] = report.ok() ? "ok" : "failing";
  json["reason"] = report.reason();
  json["checks"] = nlohmann::ordered_json::array();
  for (const HealthCheck& check : report.checks)
    json["checks"].push_back({{"name", check.name}, {"ok", check.ok}, {"detail", check.detail}});
  // Bytes that are no UTF-8 are replaced, never thrown over.
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

// civetweb wants its library set up once a process; it counts.
class CivetLibrary {
 public:
  CivetLibrary() { mg_init_library(0); }
  ~CivetLibrary() { mg_exit_library(); }
  CivetLibrary(const CivetLibrary&) = delete;
  CivetLibrary& operator=(const CivetLibrary&) = delete;
};

// Connects to a listener of this machine and hangs up. Never blocks.
void knock(const std::string& address, uint16_t port) {
  sockaddr_in v4{};
  sockaddr_in6 v6{};
  v4.sin_family = AF_INET;
  v6.sin6_family = AF_INET6;
  v4.sin_port = v6.sin6_port = htons(port);
  const bool is_v4 = ::inet_pton(AF_INET, address.c_str(), &v4.sin_addr) == 1;
  if (!is_v4 && ::inet_pton(AF_INET6, address.c_str(), &v6.sin6_addr) != 1) return;
  const int fd =
      ::socket(is_v4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return;
  const auto* const to =
      is_v4 ? reinterpret_cast<const sockaddr*>(&v4) : reinterpret_cast<const sockaddr*>(&v6);
  (void)::connect(fd, to, is_v4 ? sizeof v4 : sizeof v6);
  ::close(fd);
}

}  // namespace

bool HealthReport::ok() const {
  for (const HealthCheck& check : checks)
    if (!check.ok) return false;
  return true;
}

std::string HealthReport::reason() const {
  std::string out;
  for (const HealthCheck& check : checks) {
    if (check.ok) continue;
    if (!out.empty()) out += "; ";
    out.append(check.name).append(": ").append(check.detail);
  }
  return out;
}

struct HttpServer::Impl {
  CivetLibrary library;
  HttpHandlers handlers;
  mg_context* context = nullptr;
  uint16_t port = 0;
  std::string address;
  std::thread stopper;
  std::future<void> stopped;
  bool stopping = false;

  static int serve(mg_connection* connection, void* data) {
    const auto& self = *static_cast<const Impl*>(data);
    const mg_request_info* request = mg_get_request_info(connection);
    const std::string_view method(request->request_method);
    const std::string_view path(request->local_uri == nullptr ? "" : request->local_uri);
    if (method != "GET" && method != "HEAD")
      return answer(connection, 405, kText, "only GET and HEAD\n");
    if (path == "/metrics") return answer(connection, 200, kText, self.handlers.metrics());
    if (path == "/healthz") return report(connection, self.handlers.healthy());
    if (path == "/readyz") return report(connection, self.handlers.ready());
    if (path == "/") return answer(connection, 200, kText, "kvferryd: /metrics /healthz /readyz\n");
    return answer(connection, 404, kText, "not found\n");
  }
  static int report(mg_connection* connection, const HealthReport& health) {
    return answer(connection, health.ok() ? 200 : 503, kJson, to_json(health));
  }
};

Result<std::unique_ptr<HttpServer>> HttpServer::start(const std::string& address, uint16_t port,
                                                      HttpHandlers handlers) {
  auto impl = std::make_unique<Impl>();
  impl->handlers = std::move(handlers);
  impl->address = address;
  const bool v6 = address.find(':') != std::string::npos;
  const std::string listen = (v6 ? "[" + address + "]" : address) + ":" + std::to_string(port);
  // Few threads and short waits: scrapes are rare and answers small, strangers may be slow.
  const std::array<const char*, 13> options{"listening_ports",
                                            listen.c_str(),
                                            "num_threads",
                                            "4",
                                            "request_timeout_ms",
                                            "5000",
                                            "connection_queue",
                                            "16",
                                            "enable_directory_listing",
                                            "no",
                                            "enable_keep_alive",
                                            "no",
                                            nullptr};
  std::array<char, 256> text{};
  mg_error_data error{};
  error.text = text.data();
  error.text_buffer_size = text.size();
  mg_callbacks callbacks{};
  // What strangers do wrong is not worth a line of ours, nor of stderr.
  callbacks.log_message = [](const mg_connection*, const char*) { return 1; };
  mg_init_data init{};
  init.callbacks = &callbacks;
  init.configuration_options = const_cast<const char**>(options.data());
  impl->context = mg_start2(&init, &error);
  if (impl->context == nullptr)
    return fail(Code::kUnavailable, "HTTP_LISTEN",
                "cannot listen on " + listen + ": " +
                    (text[0] != '\0' ? text.data() : std::strerror(errno)));
  std::array<mg_server_port, 1> ports{};
  if (mg_get_server_ports(impl->context, 1, ports.data()) == 1)
    impl->port = static_cast<uint16_t>(ports[0].port);
  mg_set_request_handler(impl->context, "**", &Impl::serve, impl.get());
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

HttpServer::~HttpServer() {
  stop_async();
  join();
}

uint16_t HttpServer::port() const {
  return impl_->port;
}

void HttpServer::stop_async() {
  if (std::exchange(impl_->stopping, true)) return;
  std::promise<void> stopped;
  impl_->stopped = stopped.get_future();
  impl_->stopper = std::thread([context = impl_->context, stopped = std::move(stopped)]() mutable {
    mg_stop(context);
    stopped.set_value();
  });
}

void HttpServer::join() {
  if (!impl_->stopper.joinable()) return;
  // civetweb's listening thread looks at the flag that mg_stop sets when a connection comes, else
  // every two seconds.
  while (impl_->stopped.wait_for(std::chrono::milliseconds(10)) != std::future_status::ready)
    knock(impl_->address, impl_->port);
  impl_->stopper.join();
}

}  // namespace kvferry::ops
