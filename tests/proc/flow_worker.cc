#include "tests/proc/flow_worker.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

namespace kvferry::testing {
namespace {

constexpr std::byte kPoison{0xDD};

template <typename T>
T must(client::Result<T> result, const char* what) {
  if (!result) throw std::runtime_error(std::string(what) + ": " + result.error().to_string());
  return std::move(*result);
}

void put_cell(std::byte* to, uint64_t request, uint32_t layer, uint32_t role, uint64_t head,
              uint64_t position, uint64_t bytes) {
  uint64_t word = request * 0x9E3779B97F4A7C15ULL + layer;
  for (const uint64_t part : {uint64_t{role}, head, position}) {
    word = (word ^ part) * 0xBF58476D1CE4E5B9ULL;
    word ^= word >> 31;
  }
  for (uint64_t i = 0; i < bytes; ++i)
    to[i] = static_cast<std::byte>(word >> (8 * (i % 8))) ^ static_cast<std::byte>(i);
}

}  // namespace

FlowWorker::FlowWorker(Options options)
    : options_(std::move(options)), heads_(options_.heads / options_.ranks) {
  client::AttachOptions attach;
  attach.socket = options_.socket;
  attach.name = options_.instance + "-" + std::to_string(options_.rank);
  client_ = must(client::Client::attach(attach), "attach");
  registration_.instance = options_.instance;
  registration_.layout.rank = options_.rank;
  registration_.layout.rank_count = options_.ranks;
  registration_.layout.fingerprint = "flow";
  registration_.reuse_hash_scheme = options_.hash_scheme;
  for (uint32_t g = 0; g < options_.groups.size(); ++g) {
    const FlowGroup& of = options_.groups[g];
    client::Group group;
    group.tokens_per_block = block_tokens(g);
    group.sliding_window = of.window;
    group.block_count = options_.blocks;
    group.id_space = g;
    for (uint32_t i = 0; i < of.layers.size(); ++i) {
      for (uint32_t role = 0; role < 2; ++role) {
        client::Plane plane;
        plane.layer = of.layers[i];
        if (of.state) {
          plane.role = role == 0 ? "conv" : "ssm";
          plane.granularity = client::Granularity::kRequest;
        } else {
          plane.role = role == 0 ? "key" : "value";
          plane.token_stride = options_.cell_bytes;
        }
        plane.units_total = options_.heads;
        plane.unit_begin = options_.rank * heads_;
        plane.unit_count = heads_;
        plane.cell_bytes = options_.cell_bytes;
        plane.type = "bf16";
        plane.pool = g;
        plane.unit_stride = block_tokens(g) * options_.cell_bytes;
        plane.offset = (uint64_t{i} * 2 + role) * heads_ * plane.unit_stride;
        plane.block_stride = page_bytes(g);
        group.planes.push_back(std::move(plane));
      }
    }
    registration_.layout.groups.push_back(std::move(group));
    registration_.layout.pools.push_back(
        {"kv" + std::to_string(g), page_bytes(g) * options_.blocks});
  }
  make_pools();
  register_again();
}

void FlowWorker::make_pools() {
  free_.assign(options_.groups.size(), {});
  for (uint32_t g = 0; g < options_.groups.size(); ++g) {
    const client::PoolSpan& pool = registration_.layout.pools[g];
    pools_.push_back(must(client_->alloc_pool(pool.name, pool.bytes), "alloc_pool"));
    for (int32_t id = 1; id < static_cast<int32_t>(options_.blocks); ++id) {
      free_[g].insert(id);
      poison(g, id);
    }
  }
}

void FlowWorker::unregister(bool with_pools) {
  std::vector<std::string> names;
  for (const client::PoolSpan& pool : registration_.layout.pools) names.push_back(pool.name);
  const client::Status done =
      with_pools ? client_->unregister_pools(names) : client_->unregister_layout(layout());
  if (!done) throw std::runtime_error("unregister: " + done.error().to_string());
  completed_.clear();  // too late to look
  if (with_pools) {
    pools_.clear();
    held_.clear();
    return;
  }
  // Overwritten here and not again at RELEASED, so that a copy that still runs is found out.
  while (!held_.empty()) release(held_.begin()->first);
}

void FlowWorker::register_again() {
  if (pools_.empty()) make_pools();
  registered_ = must(client_->register_layout(registration_), "register_layout");
}

void FlowWorker::punch() {
  for (const client::PoolMemory& pool : pools_)
    if (::madvise(pool.data, pool.bytes, MADV_REMOVE) != 0)
      throw std::runtime_error("madvise: " + std::string(std::strerror(errno)));
}

FlowWorker::~FlowWorker() = default;

void FlowWorker::die() {
  client_.reset();
}

// ---- pages -------------------------------------------------------------------------------------

uint64_t FlowWorker::block_tokens(uint32_t group) const {
  return options_.groups[group].state ? 1 : kFlowBlock;
}
uint64_t FlowWorker::page_bytes(uint32_t group) const {
  return options_.groups[group].layers.size() * 2 * heads_ * block_tokens(group) *
         options_.cell_bytes;
}
std::byte* FlowWorker::page(uint32_t group, int32_t id) const {
  return pools_[group].data + static_cast<uint64_t>(id) * page_bytes(group);
}
void FlowWorker::poison(uint32_t group, int32_t id) {
  std::fill_n(page(group, id), page_bytes(group), kPoison);
}

FlowWorker::Pages FlowWorker::allocate(uint64_t tokens) {
  Pages pages;
  for (uint32_t g = 0; g < free_.size(); ++g) {
    std::set<int32_t>& free = free_[g];
    auto& ids = pages.emplace_back();
    const uint64_t count = options_.groups[g].state ? 1 : (tokens + kFlowBlock - 1) / kFlowBlock;
    if (free.size() < count) throw std::runtime_error("the engine's pool is empty");
    for (uint64_t i = 0; i < count; ++i) {
      // From both ends in turn: blocks that follow each other lie apart.
      const auto it = i % 2 == 0 ? free.begin() : std::prev(free.end());
      ids.push_back(*it);
      free.erase(it);
    }
  }
  return pages;
}

void FlowWorker::give_back(const Pages& pages) {
  for (uint32_t g = 0; g < pages.size(); ++g)
    for (const int32_t id : pages[g]) {
      if (id <= 0) continue;
      if (!free_[g].insert(id).second) throw std::runtime_error("a page is given back twice");
      poison(g, id);
    }
}

std::size_t FlowWorker::free_pages() const {
  std::size_t count = 0;
  for (const auto& free : free_) count += free.size();
  return count;
}

template <typename Fn>
void FlowWorker::for_each_cell(const Pages& pages, uint32_t group, uint64_t begin, uint64_t end,
                               Fn&& fn) const {
  const auto& layers = options_.groups[group].layers;
  const uint64_t block = block_tokens(group);
  const bool state = options_.groups[group].state;
  // A state is of the tokens before `end`.
  for (uint64_t position = state ? end : begin; position < (state ? end + 1 : end); ++position) {
    const uint64_t entry = state ? 0 : position / block;
    const int32_t id = pages[group][entry];
    if (id <= 0) continue;
    for (uint32_t i = 0; i < layers.size(); ++i)
      for (uint32_t role = 0; role < 2; ++role)
        for (uint32_t head = 0; head < heads_; ++head)
          fn(page(group, id) +
                 ((uint64_t{i} * 2 + role) * heads_ + head) * block * options_.cell_bytes +
                 position % block * options_.cell_bytes,
             layers[i], role, options_.rank * heads_ + head, position);
  }
}

void FlowWorker::compute(uint64_t request, const Pages& pages, uint64_t begin, uint64_t end) {
  for (uint32_t g = 0; g < pages.size(); ++g)
    for_each_cell(
        pages, g, begin, end,
        [&](std::byte* at, uint32_t layer, uint32_t role, uint64_t head, uint64_t position) {
          put_cell(at, request, layer, role, head, position, options_.cell_bytes);
        });
}

bool FlowWorker::holds(uint64_t request, const Pages& pages, uint32_t group, uint64_t begin,
                       uint64_t end) const {
  bool same = true;
  std::vector<std::byte> cell(options_.cell_bytes);
  for_each_cell(
      pages, group, begin, end,
      [&](const std::byte* at, uint32_t layer, uint32_t role, uint64_t head, uint64_t position) {
        put_cell(cell.data(), request, layer, role, head, position, options_.cell_bytes);
        same = same && std::memcmp(at, cell.data(), cell.size()) == 0;
      });
  return same;
}

void FlowWorker::check_free_pages() const {
  for (uint32_t g = 0; g < free_.size(); ++g)
    for (const int32_t id : free_[g]) {
      const std::byte* bytes = page(g, id);
      if (!std::all_of(bytes, bytes + page_bytes(g), [](std::byte b) { return b == kPoison; }))
        throw std::runtime_error("free page " + std::to_string(id) + " was written");
    }
}

// ---- transfers ---------------------------------------------------------------------------------

void FlowWorker::hold(client::TransferHandle transfer, const Pages& pages) {
  auto& held = held_[transfer];
  held.resize(pages.size());
  for (uint32_t g = 0; g < pages.size(); ++g)
    for (const int32_t id : pages[g])
      if (id > 0) held[g].insert(id);
}

void FlowWorker::revoked(client::TransferHandle transfer, const Pages& pages) {
  for (uint32_t g = 0; g < pages.size(); ++g)
    for (const int32_t id : pages[g]) held_[transfer][g].erase(id);
  give_back(pages);
}

client::TransferHandle FlowWorker::open_send(const client::TransferKey& key,
                                             std::chrono::milliseconds lease) {
  client::OpenSendRequest request;
  request.key = key;
  request.layout = layout();
  request.lease = lease;
  return must(client_->open_send(request), "open_send");
}

client::TransferHandle FlowWorker::send(const client::TransferKey& key, uint32_t index,
                                        const Pages& pages, uint64_t begin, uint64_t end,
                                        uint64_t prompt, bool last,
                                        const std::function<void(client::SendRequest&)>& more) {
  std::vector<std::vector<int32_t>> ids = pages;
  std::vector<client::GroupBlocks> groups;
  for (uint32_t g = 0; g < ids.size(); ++g) {
    if (options_.groups[g].state && (getenv("BRK") ? begin > 48 : !last)) continue;
    std::replace(ids[g].begin(), ids[g].end(), 0, client::kHole);  // the engine's null block
    groups.push_back({g, 0, ids[g], {}, 0});
  }
  client::SendRequest request;
  request.key = key;
  request.layout = layout();
  request.index = index;
  request.num_tokens = prompt;
  request.tokens = {begin, end};
  request.groups = groups;
  request.last = last;
  if (more) more(request);
  const client::TransferHandle transfer = must(client_->send(request), "send");
  hold(transfer, pages);
  return transfer;
}

client::TransferHandle FlowWorker::receive(
    const client::TransferKey& key, const std::string& ticket, const Pages& pages, uint64_t prompt,
    const std::vector<uint64_t>& cached, const std::function<void(client::ReceiveRequest&)>& more) {
  std::vector<std::vector<int32_t>> ids = pages;
  std::vector<client::GroupBlocks> groups;
  for (uint32_t g = 0; g < ids.size(); ++g) {
    std::replace(ids[g].begin(), ids[g].end(), 0, client::kHole);
    groups.push_back({g, 0, ids[g], {}, g < cached.size() ? cached[g] : 0});
  }
  client::ReceiveRequest request;
  request.key = key;
  request.layout = layout();
  request.ticket = ticket;
  request.num_tokens = prompt;
  request.groups = groups;
  if (more) more(request);
  const client::TransferHandle transfer = must(client_->receive(request), "receive");
  hold(transfer, pages);
  return transfer;
}

void FlowWorker::release(client::TransferHandle transfer) {
  const auto it = held_.find(transfer);
  if (it == held_.end()) return;
  Pages pages;
  for (const auto& ids : it->second) pages.emplace_back(ids.begin(), ids.end());
  held_.erase(it);
  give_back(pages);
}

void FlowWorker::step() {
  if (client_ == nullptr) return;
  std::vector<client::Event> events(16);
  const std::size_t count = client_->poll(events);
  for (std::size_t i = 0; i < count; ++i) {
    const client::Event& event = events[i];
    Told& told = told_[event.transfer];
    switch (event.kind) {
      case client::EventKind::kReceiverReady:
        ++told.receiver_ready;
        break;
      case client::EventKind::kSourceReleased:
        ++told.source_released;
        release(event.transfer);
        break;
      case client::EventKind::kDestReleased:
        ++told.dest_released;
        release(event.transfer);
        break;
      case client::EventKind::kCompleted:
        ++told.completed;
        if (const auto it = completed_.find(event.transfer); it != completed_.end()) it->second();
        break;
      case client::EventKind::kDelivered:
        ++told.delivered;
        break;
      case client::EventKind::kFailed:
        ++told.failed;
        told.reason = event.reason;
        break;
      case client::EventKind::kCancelled:
        ++told.cancelled;
        told.reason = event.reason;
        break;
      case client::EventKind::kRejected:
        told.rejected = event.error;
        if (!held_.contains(event.transfer)) break;
        // Nothing of it is held where its first operation was refused.
        if (const auto status = client_->status(event.transfer);
            !status || status->state == client::TransferState::kNone)
          release(event.transfer);
        break;
      case client::EventKind::kDaemonRestarted:
        ++restarts_;
        break;
      case client::EventKind::kReattached:
        if (event.error) throw std::runtime_error("reattached: " + event.error->to_string());
        ++reattached_;
        break;
      default:
        break;
    }
    if (told.source_released + told.dest_released > 1)
      throw std::runtime_error("pages were released twice");
  }
}

void run_until(const std::vector<FlowWorker*>& workers, const std::function<bool()>& done,
               std::chrono::milliseconds limit) {
  const auto until = std::chrono::steady_clock::now() + limit;
  for (;;) {
    for (FlowWorker* worker : workers) worker->step();
    if (done()) return;
    if (std::chrono::steady_clock::now() > until) throw std::runtime_error("it did not come true");
    std::this_thread::sleep_for(std::chrono::microseconds(200));  // between two steps
  }
}

}  // namespace kvferry::testing
