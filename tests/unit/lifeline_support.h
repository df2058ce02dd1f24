// A lifeline server in a directory of its own, and what it reported.
#pragma once

#include <unistd.h>

#include <catch2/catch.hpp>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "daemon/rpc/lifeline.h"

namespace kvferry::rpc {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string path = (std::filesystem::temp_directory_path() / "kvferry-test-XXXXXX").string();
    REQUIRE(::mkdtemp(path.data()) != nullptr);
    path_ = path;
  }
  // Somebody else's.
  explicit TemporaryDirectory(std::string path) : path_(std::move(path)), owned_(false) {}
  ~TemporaryDirectory() {
    if (owned_) std::filesystem::remove_all(path_);
  }
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
  bool owned_ = true;
};

// Collects callbacks; waits for them with a generous deadline.
class Recorder : public LifelineEvents {
 public:
  void on_attached(const std::shared_ptr<Session>& session) override {
    note([&] { attached.push_back(session); });
  }
  void on_gone(const std::shared_ptr<Session>& session, GoneReason reason) override {
    note([&] { gone.emplace_back(session->facts().name, reason); });
  }
  void on_doorbell(const std::shared_ptr<Session>&) override {
    note([&] { ++doorbells; });
  }
  void on_refused(std::size_t, const Error& error) override {
    note([&] { refused.push_back(error.reason); });
  }

  template <typename F>
  bool wait(F&& condition) {
    std::unique_lock<std::mutex> lock(mutex);
    return changed.wait_for(lock, std::chrono::seconds(20), condition);
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::shared_ptr<Session>> attached;
  std::vector<std::pair<std::string, GoneReason>> gone;
  std::vector<std::string> refused;
  int doorbells = 0;

 private:
  template <typename F>
  void note(F&& change) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      change();
    }
    changed.notify_all();
  }
};

inline LifelineConfig lifeline_config(const TemporaryDirectory& directory, uint8_t boot_byte = 1) {
  LifelineConfig config;
  config.boot.bytes.fill(boot_byte);
  config.page = {64, 128, 512, 16, 16};
  LifelineSocket socket;
  socket.path = directory.file("worker.sock");
  socket.grpc_path = directory.file("grpc.sock");
  socket.worker_limits.transfers = 64;
  socket.worker_limits.descriptors = 20;
  config.sockets.push_back(socket);
  return config;
}

}  // namespace kvferry::rpc
