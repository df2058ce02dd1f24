#include "client/bench/echo.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>

#include "client/bench/stop.h"
#include "echo.grpc.pb.h"

namespace kvferry::bench {
namespace {

using client::Code;
using client::Error;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kStartLimit(10);
constexpr std::chrono::seconds kCallLimit(5);

Error failed(std::string message) {
  return Error{Code::kUnavailable, "BENCH_ECHO", std::move(message), {}, {}};
}

class EchoService final : public wire::Echo::Service {
  grpc::Status Call(grpc::ServerContext*, const wire::EchoMessage* request,
                    wire::EchoMessage* response) override {
    *response = *request;
    return grpc::Status::OK;
  }
};

}  // namespace

int serve_echo(const std::string& socket) {
  EchoService service;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("unix:" + socket, grpc::InsecureServerCredentials());
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) {
    std::fprintf(stderr, "kvferry-bench: cannot listen on %s\n", socket.c_str());
    return 1;
  }
  // The starter holds the other end of standard input for as long as it lives.
  char byte = 0;
  while (::read(STDIN_FILENO, &byte, 1) > 0) {
  }
  server->Shutdown(std::chrono::system_clock::now());
  return 0;
}

struct Echo::Channel {
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<wire::Echo::Stub> stub;
  wire::EchoMessage request;
  wire::EchoMessage response;
  int input = -1;  // of the server
};

Echo::Echo() : channel_(std::make_unique<Channel>()) {}

client::Result<std::unique_ptr<Echo>> Echo::start() {
  std::unique_ptr<Echo> echo(new Echo);
  char directory[] = "/tmp/kvferry-echo.XXXXXX";
  if (::mkdtemp(directory) == nullptr) return failed("mkdtemp failed");
  echo->directory_ = directory;
  const std::string socket = echo->directory_ + "/socket";
  int input[2] = {-1, -1};
  if (::pipe2(input, O_CLOEXEC) != 0) return failed("pipe2 failed");
  std::string words[] = {"kvferry-bench", "echo-server", socket};
  char* const argv[] = {words[0].data(), words[1].data(), words[2].data(), nullptr};
  echo->server_ = ::_Fork();
  if (echo->server_ == 0) {  // only what a signal handler may do
    ::dup2(input[0], STDIN_FILENO);
    ::execv("/proc/self/exe", argv);
    ::_exit(127);
  }
  ::close(input[0]);
  echo->channel_->input = input[1];
  if (echo->server_ < 0) return failed("fork failed");
  grpc::ChannelArguments arguments;
  arguments.SetString("grpc.default_authority", "localhost");
  echo->channel_->channel =
      grpc::CreateCustomChannel("unix:" + socket, grpc::InsecureChannelCredentials(), arguments);
  echo->channel_->stub = wire::Echo::NewStub(echo->channel_->channel);
  for (const auto limit = Clock::now() + kStartLimit; !echo->call(0);) {
    if (auto stop = stop_asked()) return *stop;
    if (Clock::now() > limit) return failed("the echo server does not answer");
    ::poll(nullptr, 0, 20);  // between two questions
  }
  return echo;
}

Echo::~Echo() {
  channel_->stub.reset();
  channel_->channel.reset();
  if (channel_->input >= 0) ::close(channel_->input);
  if (server_ > 0) {
    ::kill(server_, SIGKILL);  // it has nothing to save
    ::waitpid(server_, nullptr, 0);
  }
  std::error_code error;
  if (!directory_.empty()) std::filesystem::remove_all(directory_, error);
}

client::Result<double> Echo::call(std::size_t bytes) {
  channel_->request.mutable_payload()->assign(bytes, 'x');
  grpc::ClientContext context;
  context.set_wait_for_ready(true);
  context.set_deadline(std::chrono::system_clock::now() + kCallLimit);
  const Clock::time_point begin = Clock::now();
  const grpc::Status status =
      channel_->stub->Call(&context, channel_->request, &channel_->response);
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  if (!status.ok()) return failed(status.error_message());
  if (channel_->response.payload().size() != bytes) return failed("an answer of other size");
  return seconds;
}

}  // namespace kvferry::bench
