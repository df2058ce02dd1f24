#include "kvferry/client.h"

#include "client/cpp/src/impl.h"
#include "daemon/base/crypto.h"
#include "daemon/base/ids.h"

namespace kvferry::client {

using Stub = pb::WorkerService::Stub;

Client::Client(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Client::~Client() {
  // In a forked child the threads do not exist, so nothing can be ended in an orderly way.
  if (impl_ && !impl_->usable()) static_cast<void>(impl_.release());
}

Result<std::unique_ptr<Client>> Client::attach(AttachOptions options) {
  auto impl = std::make_unique<Impl>(std::move(options));
  if (auto started = impl->start(); !started) return started.error();
  return std::unique_ptr<Client>(new Client(std::move(impl)));
}

Result<PoolMemory> Client::alloc_pool(std::string_view name, uint64_t bytes) {
  return impl_->alloc_pool(name, bytes);
}

Status Client::export_pool(std::string_view name, int fd, uint64_t bytes) {
  const PoolFile file{std::string(name), fd, bytes};
  return impl_->register_pools({&file, 1});
}

Status Client::register_pools(std::span<const PoolFile> pools) {
  return impl_->register_pools(pools);
}

Status Client::unregister_pools(std::span<const std::string> names) {
  return impl_->unregister_pools(names);
}

Status Client::export_pool(std::string_view name, const void* device_pointer, uint64_t bytes,
                           const DevicePoolOptions& options) {
  return impl_->export_device_pool(name, reinterpret_cast<uint64_t>(device_pointer), bytes,
                                   options);
}

Result<DevicePoolMemory> Client::alloc_device_pool(std::string_view name, uint64_t bytes,
                                                   int device) {
  return impl_->alloc_device_pool(name, bytes, device);
}

Status Client::restore_pools() {
  return impl_->restore_pools();
}

Result<RegisteredLayout> Client::register_layout(const LayoutRegistration& registration) {
  return impl_->register_layout(registration);
}

Status Client::unregister_layout(const LayoutRef& layout) {
  return impl_->unregister_layout(layout);
}

Result<JoinedInstance> Client::join_instance(std::string_view instance,
                                             std::span<const std::string> cards,
                                             const std::optional<Bytes16>& key) {
  pb::JoinInstanceRequest request;
  request.set_instance(std::string(instance));
  for (const std::string& card : cards) request.add_cards(card);
  if (key) request.set_instance_key(key->data(), key->size());
  auto response = impl_->call(&Stub::JoinInstance, request);
  if (!response) return response.error();
  JoinedInstance out;
  out.incarnation = decode16(response->incarnation());
  out.complete = response->complete();
  out.missing_ranks.assign(response->missing_ranks().begin(), response->missing_ranks().end());
  out.existing = response->existing();
  return out;
}

Result<std::string> Client::ticket(std::string_view instance) {
  pb::GetTicketRequest request;
  request.set_instance(std::string(instance));
  auto response = impl_->call(&Stub::GetTicket, request);
  if (!response) return response.error();
  return std::move(*response->mutable_ticket());
}

Result<Resolution> Client::resolve(std::string_view ticket,
                                   const std::optional<LayoutRef>& layout) {
  pb::ResolveRequest request;
  request.set_ticket(std::string(ticket));
  if (layout) encode(*layout, request.mutable_layout());
  auto response = impl_->call(&Stub::Resolve, request);
  if (!response) return response.error();
  Resolution out;
  out.reachable = response->reachable();
  out.compatible = response->compatible();
  out.problem = decode(response->problem());
  out.transport = response->transport();
  out.instance = response->instance();
  out.incarnation = decode16(response->incarnation());
  out.rank_count = response->rank_count();
  return out;
}

Result<TransferHandle> Client::open_send(const OpenSendRequest& request) {
  return impl_->submit(Side::kSender, request.key, request.layout,
                       [&](TransferHandle handle) { return encode(request, handle); });
}

Result<TransferHandle> Client::send(const SendRequest& request) {
  return impl_->submit(Side::kSender, request.key, request.layout,
                       [&](TransferHandle handle) { return encode(request, handle); });
}

Result<TransferHandle> Client::receive(const ReceiveRequest& request) {
  return impl_->submit(Side::kReceiver, request.key, request.layout,
                       [&](TransferHandle handle) { return encode(request, handle); });
}

Result<TransferHandle> Client::claim(const ClaimRequest& request) {
  return impl_->submit(Side::kReceiver, request.key, request.layout,
                       [&](TransferHandle handle) { return encode_claim(request, handle); });
}

Status Client::decline(const ClaimRequest& request) {
  auto operation = encode_decline(request);
  if (!operation) return operation.error();
  return impl_->decline(transfer_key(Side::kReceiver, request.key, request.layout),
                        std::move(*operation));
}

Status Client::commit_reuse(TransferHandle transfer, std::vector<GroupCommit> groups) {
  return impl_->submit_known(transfer, encode_commit(std::move(groups), transfer));
}

Status Client::close(TransferHandle transfer) {
  if (!impl_->usable()) return Impl::not_attached();
  auto closing = impl_->transfers().may_close(transfer);
  if (!closing) return closing.error();
  if (*closing == Transfers::Closing::kTellDaemon)
    if (auto queued = impl_->submit_without_transfer(encode_close(transfer)); !queued)
      return queued;
  impl_->transfers().forget(transfer);
  return {};
}

Result<CancelResult> Client::cancel(TransferHandle transfer) {
  pb::CancelRequest request;
  request.set_client_handle(transfer);
  auto response = impl_->call_about(transfer, &Stub::Cancel, request);
  if (!response) return response.error();
  CancelResult out;
  out.state = static_cast<TransferState>(response->state());
  out.memory_in_use = response->memory_in_use();
  out.reason = response->reason();
  return out;
}

Result<std::vector<uint32_t>> Client::revoke(TransferHandle transfer, uint64_t from_token) {
  pb::RevokeRequest request;
  request.set_client_handle(transfer);
  request.set_from_token(from_token);
  auto response = impl_->call_about(transfer, &Stub::Revoke, request);
  if (!response) return response.error();
  return std::vector<uint32_t>(response->dropped_send_indices().begin(),
                               response->dropped_send_indices().end());
}

Result<std::vector<ReceiverNeeds>> Client::receiver_needs(TransferHandle transfer) {
  pb::GetReceiverNeedsRequest request;
  request.set_client_handle(transfer);
  auto response = impl_->call_about(transfer, &Stub::GetReceiverNeeds, request);
  if (!response) return response.error();
  std::vector<ReceiverNeeds> out;
  for (const auto& receiver : response->receivers()) {
    ReceiverNeeds& to = out.emplace_back();
    to.instance = receiver.instance();
    to.incarnation = decode16(receiver.incarnation());
    to.dp_group = receiver.dp_group();
    to.ready = receiver.ready();
    for (const auto& group : receiver.groups()) {
      GroupNeeds& needs = to.groups.emplace_back();
      needs.group = group.group();
      for (const auto& range : group.ranges()) needs.ranges.push_back({range.begin(), range.end()});
    }
  }
  return out;
}

Result<uint64_t> Client::reserve(const ReserveRequest& request) {
  auto encoded = encode(request);
  if (!encoded) return encoded.error();
  auto response = impl_->call(&Stub::Reserve, *encoded);
  if (!response) return response.error();
  return response->bytes();
}

Result<ReuseLookup> Client::lookup_reuse(const LayoutRef& layout,
                                         std::span<const PromptHashes> hashes, milliseconds pin,
                                         const std::optional<Bytes16>& reuse_key) {
  auto encoded = encode_lookup(layout, hashes, pin, reuse_key);
  if (!encoded) return encoded.error();
  auto response = impl_->call(&Stub::LookupReuse, *encoded);
  if (!response) return response.error();
  ReuseLookup out;
  for (const auto& group : response->groups())
    out.groups.push_back({group.group(), group.tokens()});
  out.pin = response->pin();
  return out;
}

Result<uint32_t> Client::withdraw_reuse(const LayoutRef& layout,
                                        std::span<const GroupBlocks> blocks) {
  auto encoded = encode_withdraw(layout, blocks);
  if (!encoded) return encoded.error();
  auto response = impl_->call(&Stub::WithdrawReuse, *encoded);
  if (!response) return response.error();
  return response->withdrawn_count();
}

Result<std::string> Client::aux(TransferHandle transfer) {
  return impl_->aux(transfer);
}

std::size_t Client::poll(std::span<Event> events) {
  return impl_->poll(events);
}

std::size_t Client::wait_any(std::span<Event> events, Deadline deadline) {
  return impl_->wait_any(events, deadline);
}

Result<TransferStatus> Client::wait(TransferHandle transfer, Deadline deadline) {
  return impl_->wait(transfer, deadline);
}

Result<TransferStatus> Client::status(TransferHandle transfer) const {
  if (!impl_->usable()) return Impl::not_attached();
  return impl_->transfers().status(transfer);
}

int Client::event_fd() const {
  return impl_->event_fd();
}

Result<uint32_t> Client::alloc_word() {
  return impl_->alloc_word(true);
}
void Client::free_word(uint32_t word) {
  impl_->free_word(true, word);
}
Status Client::signal(uint32_t word, uint64_t value) {
  return impl_->signal(word, value);
}
uint64_t* Client::word_address(uint32_t word) {
  return impl_->word_address(word);
}
Result<uint32_t> Client::alloc_done_word() {
  return impl_->alloc_word(false);
}
void Client::free_done_word(uint32_t word) {
  impl_->free_word(false, word);
}
uint64_t Client::done_value(uint32_t word) const {
  return impl_->done_value(word);
}

Status Client::register_words_with_device(int device) {
  return impl_->register_words_with_device(device);
}
uint64_t Client::device_word_address(uint32_t word) const {
  const auto words = impl_->device_words();
  return words ? words->timeline_address(word) : 0;
}
uint64_t Client::device_done_address(uint32_t word) const {
  const auto words = impl_->device_words();
  return words ? words->done_address(word) : 0;
}
Status Client::signal_on_stream(void* stream, uint32_t word, uint64_t value) {
  const auto words = impl_->device_words();
  return words ? words->write(stream, word, value) : Impl::words_not_registered();
}
Status Client::wait_on_stream(void* stream, uint32_t done_word, uint64_t value) {
  const auto words = impl_->device_words();
  return words ? words->wait(stream, done_word, value) : Impl::words_not_registered();
}
Result<std::string> Client::export_event(const void* event) {
  return impl_->export_event(event);
}

bool Client::attached() const {
  return impl_->current() != nullptr;
}
bool Client::draining() const {
  return impl_->usable() && impl_->transfers().draining();
}
Bytes16 Client::boot_id() const {
  return impl_->usable() ? impl_->boot_id() : Bytes16{};
}
ClientStats Client::stats() const {
  return impl_->usable() ? impl_->stats() : ClientStats{};
}

Bytes16 random_bytes16() {
  Bytes16 out;
  random_bytes(out);
  return out;
}

std::string to_text(const Bytes16& bytes) {
  return to_base64url(bytes);
}

std::optional<Bytes16> bytes16_from_text(std::string_view text) {
  std::string bytes;
  if (!from_base64url(text, bytes) || bytes.size() != 16) return std::nullopt;
  return decode16(bytes);
}

}  // namespace kvferry::client
