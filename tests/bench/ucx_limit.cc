// kvferry_ucx_limit: what UCX lets through without a daemon around it. Two processes of one thread
// each: one gathers fragments into chunks and sends them as active messages by rendezvous, the
// other receives and scatters them; both spin. UCX is set as kvferry-rails sets it. No flow control
// but the number of chunks, no tags, no deadlines, no evidence: a yardstick, not a way to do it.
// Every byte is compared after each round.
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "daemon/rails/ucx_environment.h"

namespace {

struct Options {
  std::string path = "tcp";
  uint64_t fragments = 16384;
  uint64_t fragment_bytes = 4096;
  uint64_t chunk_bytes = 1 << 20;
  uint32_t depth = 8;
  uint32_t rounds = 15;
  uint32_t warm_up = 2;

  uint64_t bytes() const { return fragments * fragment_bytes; }
  uint64_t per_chunk() const { return chunk_bytes / fragment_bytes; }
  uint64_t chunks() const { return fragments / per_chunk(); }
};

constexpr unsigned kChunk = 1;  // active messages
constexpr unsigned kDone = 2;

void check(ucs_status_t status, const char* what) {
  if (status != UCS_OK)
    throw std::runtime_error(std::string(what) + ": " + ucs_status_string(status));
}

double processor_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

void put(int fd, const void* data, std::size_t bytes) {
  if (::send(fd, data, bytes, MSG_NOSIGNAL) != static_cast<ssize_t>(bytes))
    throw std::runtime_error("the other process is gone");
}

void get(int fd, void* data, std::size_t bytes) {
  if (::recv(fd, data, bytes, MSG_WAITALL) != static_cast<ssize_t>(bytes))
    throw std::runtime_error("the other process is gone");
}

std::byte* map_memory(std::size_t bytes) {
  void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (at == MAP_FAILED) throw std::runtime_error("no memory");
  return static_cast<std::byte*>(at);
}

// One process: UCX, a pool of twice the fragments, whose places are drawn, and room for chunks.
class Side {
 public:
  Side(const Options& options, int channel, uint64_t seed) : options_(options), channel_(channel) {
    connect();
    pool_ = map_memory(2 * options.bytes());
    room_ = map_memory(options.depth * options.chunk_bytes);
    places_.resize(2 * options.fragments);
    std::iota(places_.begin(), places_.end(), uint64_t{0});
    std::shuffle(places_.begin(), places_.end(), std::mt19937_64(seed));
    places_.resize(options.fragments);
  }

 protected:
  bool progress() { return ucp_worker_progress(worker_) != 0; }
  std::byte* room(std::size_t slot) const { return room_ + slot * options_.chunk_bytes; }
  std::byte* fragment(uint64_t index) const {
    return pool_ + places_[index] * options_.fragment_bytes;
  }

  void on_message(unsigned id, ucp_am_recv_callback_t callback) {
    ucp_am_handler_param_t params = {};
    params.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                        UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    params.id = id;
    params.flags = UCP_AM_FLAG_WHOLE_MSG;
    params.cb = callback;
    params.arg = this;
    check(ucp_worker_set_am_recv_handler(worker_, &params), "ucp_worker_set_am_recv_handler");
  }

  // The end of it, or none if it has ended already.
  void* send(unsigned id, std::span<const std::byte> header, std::span<const std::byte> data) {
    ucp_request_param_t param = {};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    param.flags = id == kChunk ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER;
    param.memory_type = UCS_MEMORY_TYPE_HOST;
    void* const request = ucp_am_send_nbx(endpoint_, id, header.data(), header.size(), data.data(),
                                          data.size(), &param);
    if (UCS_PTR_IS_ERR(request)) check(UCS_PTR_STATUS(request), "ucp_am_send_nbx");
    return request;
  }

  const Options& options_;
  const int channel_;
  ucp_worker_h worker_ = nullptr;

 private:
  void connect() {
    ucp_config_t* config = nullptr;
    check(ucp_config_read(nullptr, nullptr, &config), "ucp_config_read");
    const bool tcp = options_.path == "tcp";
    check(ucp_config_modify(config, "TLS", tcp ? "tcp" : "posix"), "TLS");
    if (tcp) check(ucp_config_modify(config, "NET_DEVICES", "lo"), "NET_DEVICES");
    ucp_params_t params = {};
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = UCP_FEATURE_AM;
    ucp_context_h context = nullptr;
    check(ucp_init(&params, config, &context), "ucp_init");
    ucp_config_release(config);
    ucp_worker_params_t worker = {};
    worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker.thread_mode = UCS_THREAD_MODE_SINGLE;
    check(ucp_worker_create(context, &worker, &worker_), "ucp_worker_create");
    ucp_address_t* address = nullptr;
    std::size_t bytes = 0;
    check(ucp_worker_get_address(worker_, &address, &bytes), "ucp_worker_get_address");
    put(channel_, &bytes, sizeof bytes);
    put(channel_, address, bytes);
    ucp_worker_release_address(worker_, address);
    get(channel_, &bytes, sizeof bytes);
    std::vector<std::byte> peer(bytes);
    get(channel_, peer.data(), bytes);
    ucp_ep_params_t endpoint = {};
    endpoint.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                          UCP_EP_PARAM_FIELD_ERR_HANDLER;
    endpoint.address = reinterpret_cast<const ucp_address_t*>(peer.data());
    endpoint.err_mode = UCP_ERR_HANDLING_MODE_PEER;  // as rails: other copies are made without
    endpoint.err_handler.cb = [](void*, ucp_ep_h, ucs_status_t) {};
    check(ucp_ep_create(worker_, &endpoint, &endpoint_), "ucp_ep_create");
  }

  ucp_ep_h endpoint_ = nullptr;
  std::byte* pool_ = nullptr;
  std::byte* room_ = nullptr;
  std::vector<uint64_t> places_;
};

int pattern(uint32_t round, uint64_t fragment) {
  return static_cast<int>((round * 31 + fragment * 7 + fragment / 251) % 251);
}

class Receiver : public Side {
 public:
  Receiver(const Options& options, int channel) : Side(options, channel, 2) {
    for (uint32_t slot = 0; slot < options.depth; ++slot) free_.push_back(slot);
    on_message(kChunk, [](void* self, const void* header, std::size_t, void* data, std::size_t,
                          const ucp_am_recv_param_t*) {
      Offer offer{data, 0};
      std::memcpy(&offer.chunk, header, sizeof offer.chunk);
      static_cast<Receiver*>(self)->offers_.push_back(offer);
      return UCS_INPROGRESS;
    });
  }

  // Processor seconds of the rounds that count, without looking at bytes.
  double play() {
    double spent = 0;
    for (uint32_t round = 0; round < options_.warm_up + options_.rounds; ++round) {
      const double before = processor_seconds();
      scattered_ = 0;
      // What is sent may still be here, so go on until the sender has had its end.
      void* done = nullptr;
      while (scattered_ < options_.chunks()) {
        progress();
        take();
      }
      done = send(kDone, {}, {});
      if (round >= options_.warm_up) spent += processor_seconds() - before;
      while (done != nullptr && ucp_request_check_status(done) == UCS_INPROGRESS) progress();
      if (done != nullptr) ucp_request_free(done);
      compare(round);
      const char ready = 1;
      put(channel_, &ready, 1);
    }
    return spent;
  }

 private:
  struct Offer {
    void* data = nullptr;
    uint64_t chunk = 0;
  };
  struct Landing {
    Receiver* self = nullptr;
    uint32_t slot = 0;
    uint64_t chunk = 0;
  };

  void take() {
    while (!offers_.empty() && !free_.empty()) {
      auto* const landing = new Landing{this, free_.back(), offers_.front().chunk};
      free_.pop_back();
      ucp_request_param_t param = {};
      param.op_attr_mask =
          UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
      param.memory_type = UCS_MEMORY_TYPE_HOST;
      param.user_data = landing;
      param.cb.recv_am = [](void* request, ucs_status_t status, std::size_t, void* argument) {
        auto* const it = static_cast<Landing*>(argument);
        it->self->landed(*it, status);
        delete it;
        ucp_request_free(request);
      };
      void* const request = ucp_am_recv_data_nbx(worker_, offers_.front().data, room(landing->slot),
                                                 options_.chunk_bytes, &param);
      offers_.pop_front();
      if (UCS_PTR_IS_ERR(request)) check(UCS_PTR_STATUS(request), "ucp_am_recv_data_nbx");
      if (request != nullptr) continue;
      landed(*landing, UCS_OK);
      delete landing;
    }
  }

  void landed(const Landing& landing, ucs_status_t status) {
    check(status, "receive");
    const uint64_t first = landing.chunk * options_.per_chunk();
    for (uint64_t i = 0; i < options_.per_chunk(); ++i)
      std::memcpy(fragment(first + i), room(landing.slot) + i * options_.fragment_bytes,
                  options_.fragment_bytes);
    free_.push_back(landing.slot);
    ++scattered_;
  }

  void compare(uint32_t round) {
    for (uint64_t i = 0; i < options_.fragments; ++i) {
      const auto expected = static_cast<std::byte>(pattern(round, i));
      std::byte* const at = fragment(i);
      if (std::any_of(at, at + options_.fragment_bytes,
                      [expected](std::byte b) { return b != expected; }))
        throw std::runtime_error("a wrong byte in fragment " + std::to_string(i));
      std::memset(at, 0xFF, options_.fragment_bytes);
    }
  }

  std::deque<Offer> offers_;
  std::vector<uint32_t> free_;
  uint64_t scattered_ = 0;
};

class Sender : public Side {
 public:
  Sender(const Options& options, int channel) : Side(options, channel, 1), chunks_(options.depth) {
    on_message(kDone, [](void* self, const void*, std::size_t, void*, std::size_t,
                         const ucp_am_recv_param_t*) {
      static_cast<Sender*>(self)->done_ = true;
      return UCS_OK;
    });
  }

  struct Measured {
    std::vector<double> seconds;
    double processor_seconds = 0;
  };

  Measured play() {
    Measured out;
    for (uint32_t round = 0; round < options_.warm_up + options_.rounds; ++round) {
      for (uint64_t i = 0; i < options_.fragments; ++i)
        std::memset(fragment(i), pattern(round, i), options_.fragment_bytes);
      const double before = processor_seconds();
      const auto start = std::chrono::steady_clock::now();
      transfer();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      if (round >= options_.warm_up) {
        out.seconds.push_back(took.count());
        out.processor_seconds += processor_seconds() - before;
      }
      char ready = 0;
      get(channel_, &ready, 1);
    }
    return out;
  }

 private:
  struct Chunk {
    uint64_t index = 0;  // the header, which UCX 1.13 reads until the send has ended
    void* request = nullptr;
  };

  void transfer() {
    uint64_t next = 0;
    done_ = false;
    while (!done_) {
      for (uint32_t slot = 0; slot < options_.depth; ++slot) {
        Chunk& chunk = chunks_[slot];
        if (chunk.request != nullptr) {
          if (ucp_request_check_status(chunk.request) == UCS_INPROGRESS) continue;
          check(ucp_request_check_status(chunk.request), "send");
          ucp_request_free(std::exchange(chunk.request, nullptr));
        }
        if (next == options_.chunks()) continue;
        chunk.index = next++;
        gather(chunk.index, room(slot));
        chunk.request = send(kChunk, std::as_bytes(std::span(&chunk.index, 1)),
                             {room(slot), options_.chunk_bytes});
        progress();
      }
      progress();
    }
  }

  void gather(uint64_t chunk, std::byte* to) {
    const uint64_t first = chunk * options_.per_chunk();
    for (uint64_t i = 0; i < options_.per_chunk(); ++i)
      std::memcpy(to + i * options_.fragment_bytes, fragment(first + i), options_.fragment_bytes);
  }

  std::vector<Chunk> chunks_;
  bool done_ = false;
};

// UCX reads some of it when it is loaded, so this program is started again.
void use_environment_of_rails(char** argv) {
  constexpr const char* kStarted = "KVFERRY_UCX_LIMIT_STARTED";
  if (std::getenv(kStarted) != nullptr) return;
  auto lines = kvferry::rails::make_rails_environment({});
  if (!lines) throw std::runtime_error(lines.error().to_string());
  for (const std::string& line : *lines) {
    const auto equals = line.find('=');
    (void)::setenv(line.substr(0, equals).c_str(), line.substr(equals + 1).c_str(), 1);
  }
  (void)::setenv(kStarted, "1", 1);
  ::execv("/proc/self/exe", argv);
  throw std::runtime_error("cannot start this program again");
}

int run(const Options& options) {
  int channel[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) != 0)
    throw std::runtime_error("socketpair");
  const pid_t child = ::fork();
  if (child < 0) throw std::runtime_error("fork");
  ::close(channel[child == 0 ? 0 : 1]);
  if (child == 0) {
    const double spent = Receiver(options, channel[1]).play();
    put(channel[1], &spent, sizeof spent);
    char end = 0;
    (void)::recv(channel[1], &end, 1, 0);  // UCX of both goes when both have ended
    std::_Exit(0);
  }
  auto measured = Sender(options, channel[0]).play();
  double spent = 0;
  get(channel[0], &spent, sizeof spent);
  ::close(channel[0]);
  int status = 0;
  if (::waitpid(child, &status, 0) != child || status != 0)
    throw std::runtime_error("the receiver failed");
  std::sort(measured.seconds.begin(), measured.seconds.end());
  const double median = measured.seconds[measured.seconds.size() / 2];
  const double gib = static_cast<double>(options.bytes()) / (1 << 30);
  std::printf(
      "%s, %llu x %llu B in chunks of %llu, %u at once: %.1f ms, %.2f GB/s, %.2f CPU s/GiB\n",
      options.path.c_str(), static_cast<unsigned long long>(options.fragments),
      static_cast<unsigned long long>(options.fragment_bytes),
      static_cast<unsigned long long>(options.chunk_bytes), options.depth, median * 1e3,
      static_cast<double>(options.bytes()) / median * 1e-9,
      (measured.processor_seconds + spent) / options.rounds / gib);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("What UCX lets through: gather, rendezvous, scatter by one thread on each side.");
  app.add_option("--path", options.path)
      ->check(CLI::IsMember({"tcp", "shm"}))
      ->capture_default_str();
  const CLI::Range count(1, 1 << 20);
  app.add_option("--fragments", options.fragments)->check(count)->capture_default_str();
  app.add_option("--fragment-bytes", options.fragment_bytes)->check(count)->capture_default_str();
  app.add_option("--chunk-bytes", options.chunk_bytes)->check(count)->capture_default_str();
  app.add_option("--depth", options.depth, "chunks under way")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  app.add_option("--rounds", options.rounds)->check(count)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (options.chunk_bytes % options.fragment_bytes != 0 ||
      options.fragments % options.per_chunk() != 0) {
    std::fprintf(stderr, "--chunk-bytes: whole fragments, and --fragments: whole chunks\n");
    return 2;
  }
  try {
    use_environment_of_rails(argv);
    return run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvferry_ucx_limit: %s\n", error.what());
    return 1;
  }
}
