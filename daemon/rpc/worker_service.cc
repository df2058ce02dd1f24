#include "daemon/rpc/worker_service.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <utility>

#include "daemon/rpc/grpc_status.h"
#include "daemon/rpc/layout_proto.h"
#include "daemon/rpc/pool_messages.h"
#include "daemon/rpc/submit_stream.h"
#include "daemon/rpc/unix_socket.h"
#include "daemon/rpc/watch_stream.h"
#include "kvferry/v1/worker.grpc.pb.h"

namespace kvferry::rpc {
namespace {

constexpr char kTokenMetadata[] = "kvferry-token-bin";
constexpr int kMaxCards = 4096;

using Context = grpc::CallbackServerContext;
using SessionPtr = std::shared_ptr<Session>;

template <typename Fixed>
Status take16(const std::string& text, const char* field, Fixed& out) {
  if (text.empty()) return {};
  if (text.size() != 16)
    return invalid(field, "WRONG_SIZE", std::to_string(text.size()) + " bytes, not 16");
  std::memcpy(out.bytes.data(), text.data(), 16);
  if (out.is_zero()) return invalid(field, "ALL_ZERO", "empty means none; zeros mean nothing");
  return {};
}

template <typename Tag, std::size_t N>
std::string text_of(const FixedBytes<Tag, N>& bytes) {
  return {bytes.bytes.begin(), bytes.bytes.end()};
}

void fill(const engine::Reply& reply, uint64_t op_id, v1::OperationResult& out) {
  out.set_op_id(op_id);
  out.set_slot(reply.slot);
  if (reply.error.code != Code::kOk) {
    out.set_outcome(v1::OPERATION_OUTCOME_REJECTED);
    to_proto(as_spelled(reply.error), *out.mutable_error());
  } else {
    out.set_outcome(reply.existing ? v1::OPERATION_OUTCOME_EXISTING
                                   : v1::OPERATION_OUTCOME_ACCEPTED);
  }
}

void fill(const Error& error, uint64_t op_id, v1::OperationResult& out) {
  out.set_op_id(op_id);
  out.set_outcome(v1::OPERATION_OUTCOME_REJECTED);
  to_proto(as_spelled(error), *out.mutable_error());
}

// The limits of calls, which may change between two of them. Thread-safe.
class CurrentLimits {
 public:
  void set(const OpLimits& limits) {
    MutexLock lock(mutex_);
    limits_ = limits;
  }
  OpLimits get() const {
    MutexLock lock(mutex_);
    return limits_;
  }

 private:
  mutable Mutex mutex_;
  OpLimits limits_ KVFERRY_GUARDED_BY(mutex_);
};

}  // namespace

// One socket's service.
class Service final : public v1::WorkerService::CallbackService {
 public:
  Service(WorkerBackend& backend, const WorkerServerConfig& config, const CurrentLimits& limits,
          std::size_t socket)
      : backend_(backend), config_(config), limits_(limits), socket_(socket) {}

  grpc::ServerUnaryReactor* RegisterPools(Context* context, const v1::RegisterPoolsRequest* request,
                                          v1::RegisterPoolsResponse* response) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      auto pools =
          pools_of(*request, [&](PoolKind kind) { return backend_.check_pool_kind(kind); });
      KVFERRY_RETURN_IF_ERROR(pools);
      backend_.register_pools(
          session, std::move(*pools), [response, finish](Result<PoolsOutcome> outcome) {
            if (outcome) to_proto(*outcome, *response);
            finish(outcome ? Status{} : Status(tl::unexpected(outcome.error())));
          });
      return {};
    });
  }

  grpc::ServerUnaryReactor* ProvePools(Context* context, const v1::ProvePoolsRequest* request,
                                       v1::ProvePoolsResponse*) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      KVFERRY_RETURN_IF_ERROR(check_pool_names(request->pools(), "pools", kMaxPoolsPerCall));
      backend_.prove_pools(session, {request->pools().begin(), request->pools().end()},
                           [finish](Result<bool> proven) {
                             finish(proven ? Status{} : Status(tl::unexpected(proven.error())));
                           });
      return {};
    });
  }

  grpc::ServerUnaryReactor* RegisterLayout(Context* context,
                                           const v1::RegisterLayoutRequest* request,
                                           v1::RegisterLayoutResponse* response) override {
    return unary(context, [&](const SessionPtr& session) -> Status {
      LayoutRequest asked;
      asked.instance = request->instance();
      if (!valid_name(asked.instance)) return bad_name("instance");
      if (!request->has_layout()) return invalid("layout", "MISSING", "no layout is given");
      KVFERRY_RETURN_IF_ERROR(check_hash_scheme(request->reuse_hash_scheme()));
      asked.hash_scheme = request->reuse_hash_scheme();
      KVFERRY_RETURN_IF_ERROR(take16(request->reuse_key(), "reuse_key", asked.reuse_key));
      auto layout = from_proto(request->layout());
      if (!layout) {
        Error error = layout.error();
        error.field = "layout." + error.field;
        return tl::unexpected(std::move(error));
      }
      asked.layout = std::move(*layout);
      KVFERRY_RETURN_IF_ERROR(take16(request->incarnation(), "incarnation", asked.incarnation));
      KVFERRY_RETURN_IF_ERROR(take16(request->instance_key(), "instance_key", asked.instance_key));
      auto answer = backend_.register_layout(session, std::move(asked));
      KVFERRY_RETURN_IF_ERROR(answer);
      response->set_existing(answer->existing);
      response->set_card(std::move(answer->card));
      response->set_generation(answer->generation);
      response->set_incarnation(text_of(answer->incarnation));
      response->set_complete(answer->complete);
      return {};
    });
  }

  grpc::ServerUnaryReactor* Unregister(Context* context, const v1::UnregisterRequest* request,
                                       v1::UnregisterResponse* response) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      Done<bool> done = [response, finish](Result<bool> existed) {
        if (existed) response->set_existed(*existed);
        finish(existed ? Status{} : Status(tl::unexpected(existed.error())));
      };
      switch (request->what_case()) {
        case v1::UnregisterRequest::kLayout:
          if (!valid_name(request->layout().instance())) return bad_name("layout.instance");
          backend_.unregister_layout(*session, request->layout().instance(),
                                     request->layout().rank(), std::move(done));
          return {};
        case v1::UnregisterRequest::kPools:
          KVFERRY_RETURN_IF_ERROR(
              check_pool_names(request->pools().names(), "pools.names", kMaxPoolNames));
          backend_.unregister_pools(
              *session, {request->pools().names().begin(), request->pools().names().end()},
              std::move(done));
          return {};
        case v1::UnregisterRequest::WHAT_NOT_SET:
          break;
      }
      return invalid("what", "MISSING", "a layout or pools");
    });
  }

  grpc::ServerUnaryReactor* JoinInstance(Context* context, const v1::JoinInstanceRequest* request,
                                         v1::JoinInstanceResponse* response) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      if (!valid_name(request->instance())) return bad_name("instance");
      if (request->cards_size() == 0 || request->cards_size() > kMaxCards)
        return invalid("cards", "CARD_COUNT", std::to_string(request->cards_size()));
      Secret key;
      KVFERRY_RETURN_IF_ERROR(take16(request->instance_key(), "instance_key", key));
      backend_.join_instance(
          *session, request->instance(), {request->cards().begin(), request->cards().end()}, key,
          deadline_of(*context), [response, finish](Result<JoinOutcome> outcome) {
            if (outcome) {
              response->set_existing(outcome->existing);
              response->set_incarnation(text_of(outcome->incarnation));
              response->set_complete(outcome->complete);
              for (uint32_t rank : outcome->missing_ranks) response->add_missing_ranks(rank);
            }
            finish(outcome ? Status{} : Status(tl::unexpected(outcome.error())));
          });
      return {};
    });
  }

  grpc::ServerUnaryReactor* GetTicket(Context* context, const v1::GetTicketRequest* request,
                                      v1::GetTicketResponse* response) override {
    return unary(context, [&](const SessionPtr& session) -> Status {
      if (!valid_name(request->instance())) return bad_name("instance");
      auto ticket = backend_.get_ticket(*session, request->instance());
      KVFERRY_RETURN_IF_ERROR(ticket);
      response->set_ticket(std::move(ticket->ticket));
      response->set_incarnation(text_of(ticket->incarnation));
      return {};
    });
  }

  grpc::ServerUnaryReactor* Cancel(Context* context, const v1::CancelRequest* request,
                                   v1::CancelResponse* response) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      KVFERRY_RETURN_IF_ERROR(check_handle(request->client_handle()));
      engine::CancelOp op;
      op.op.worker = session->id();
      op.client_handle = request->client_handle();
      backend_.call(session->id(), op, [response, finish](const engine::Reply& reply) {
        if (reply.error.code != Code::kOk) {
          finish(tl::unexpected(reply.error));
          return;
        }
        response->set_state(static_cast<v1::TransferState>(reply.state));
        response->set_memory_in_use(reply.memory_in_use);
        finish({});
      });
      return {};
    });
  }

  grpc::ServerUnaryReactor* Revoke(Context* context, const v1::RevokeRequest* request,
                                   v1::RevokeResponse* response) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      KVFERRY_RETURN_IF_ERROR(check_handle(request->client_handle()));
      engine::RevokeOp op;
      op.op.worker = session->id();
      op.client_handle = request->client_handle();
      op.from_token = request->from_token();
      backend_.call(session->id(), op, [response, finish](const engine::Reply& reply) {
        for (uint32_t index : reply.dropped_sends) response->add_dropped_send_indices(index);
        finish(reply.error.code == Code::kOk ? Status{} : Status(tl::unexpected(reply.error)));
      });
      return {};
    });
  }

  grpc::ServerUnaryReactor* GetReceiverNeeds(Context* context,
                                             const v1::GetReceiverNeedsRequest* request,
                                             v1::GetReceiverNeedsResponse* response) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      KVFERRY_RETURN_IF_ERROR(check_handle(request->client_handle()));
      engine::ReceiverNeedsOp op;
      op.op.worker = session->id();
      op.client_handle = request->client_handle();
      backend_.call(session->id(), op, [response, finish](const engine::Reply& reply) {
        for (const engine::Reply::Receiver& receiver : reply.receivers)
          to_proto(receiver, *response->add_receivers());
        finish(reply.error.code == Code::kOk ? Status{} : Status(tl::unexpected(reply.error)));
      });
      return {};
    });
  }

  grpc::ServerUnaryReactor* Resolve(Context* context, const v1::ResolveRequest* request,
                                    v1::ResolveResponse* response) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      auto ticket = ticket_of(*session, request->ticket());
      KVFERRY_RETURN_IF_ERROR(ticket);
      LayoutView layout;
      if (request->has_layout()) {
        auto own = layout_of(*session, request->layout(), true);
        KVFERRY_RETURN_IF_ERROR(own);
        layout = *own;
      }
      backend_.resolve(*session, request->ticket(), layout.handle, deadline_of(*context),
                       [response, finish](Result<ResolveOutcome> outcome) {
                         if (outcome) to_proto(*outcome, *response);
                         finish(outcome ? Status{} : Status(tl::unexpected(outcome.error())));
                       });
      return {};
    });
  }

  grpc::ServerUnaryReactor* Reserve(Context* context, const v1::ReserveRequest* request,
                                    v1::ReserveResponse* response) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      auto layout = layout_of(*session, request->layout(), request->has_layout());
      KVFERRY_RETURN_IF_ERROR(layout);
      auto ticket = ticket_of(*session, request->ticket());
      KVFERRY_RETURN_IF_ERROR(ticket);
      auto op = to_reserve(*request, *layout, *ticket, limits_.get());
      KVFERRY_RETURN_IF_ERROR(op);
      op->op.worker = session->id();
      backend_.call(session->id(), std::move(*op), [response, finish](const engine::Reply& reply) {
        response->set_existing(reply.existing);
        response->set_bytes(reply.reserved_bytes);
        response->set_lease_ms(static_cast<uint32_t>(
            std::chrono::duration_cast<std::chrono::milliseconds>(reply.lease).count()));
        finish(reply.error.code == Code::kOk ? Status{} : Status(tl::unexpected(reply.error)));
      });
      return {};
    });
  }

  grpc::ServerUnaryReactor* LookupReuse(Context* context, const v1::LookupReuseRequest* request,
                                        v1::LookupReuseResponse* response) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      auto layout = reuse_layout_of(*session, *request);
      KVFERRY_RETURN_IF_ERROR(layout);
      auto op = to_lookup_reuse(*request, *layout);
      KVFERRY_RETURN_IF_ERROR(op);
      op->op.worker = session->id();
      backend_.call(session->id(), std::move(*op), [response, finish](const engine::Reply& reply) {
        for (const engine::Reply::Match& match : reply.matches) {
          auto* to = response->add_groups();
          to->set_group(match.group);
          to->set_tokens(match.tokens);
        }
        response->set_pin(reply.pin);
        finish(reply.error.code == Code::kOk ? Status{} : Status(tl::unexpected(reply.error)));
      });
      return {};
    });
  }

  grpc::ServerUnaryReactor* WithdrawReuse(Context* context, const v1::WithdrawReuseRequest* request,
                                          v1::WithdrawReuseResponse* response) override {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      auto layout = layout_of(*session, request->layout(), request->has_layout());
      KVFERRY_RETURN_IF_ERROR(layout);
      auto op = to_withdraw_reuse(*request, *layout);
      KVFERRY_RETURN_IF_ERROR(op);
      op->op.worker = session->id();
      backend_.call(session->id(), std::move(*op), [response, finish](const engine::Reply& reply) {
        response->set_withdrawn_count(reply.withdrawn);
        finish(reply.error.code == Code::kOk ? Status{} : Status(tl::unexpected(reply.error)));
      });
      return {};
    });
  }

  grpc::ServerUnaryReactor* GetAux(Context* context, const v1::GetAuxRequest* request,
                                   v1::GetAuxResponse* response) override {
    return unary(context, [&](const SessionPtr& session) -> Status {
      KVFERRY_RETURN_IF_ERROR(check_handle(request->client_handle()));
      const auto aux = session->page().aux_of(request->client_handle());
      if (!aux)
        return fail(Code::kNotFound, "AUX_UNKNOWN", "no aux under this handle", "client_handle");
      response->set_aux(*aux);
      return {};
    });
  }

  grpc::ServerBidiReactor<v1::SubmitRequest, v1::SubmitResponse>* Submit(
      Context* context) override {
    const SessionPtr session = session_of(*context);
    auto* stream = new SubmitStream(
        config_.max_stream_results,
        [this, session](const v1::Operation& operation,
                        const std::shared_ptr<SubmitStream::Results>& results) {
          if (Status begun = session->begin_call(); !begun) {
            config_.on_answer(begun.error().code);
            v1::OperationResult result;
            fill(begun.error(), operation.op_id(), result);
            results->push(std::move(result));
            return;
          }
          submit(session, operation, [session, results](v1::OperationResult result) {
            session->end_call();
            results->push(std::move(result));
          });
        },
        [] {});
    if (!session) {
      stream->results()->finish(to_status(*context, unauthenticated()));
      return stream;
    }
    replace_stream(session->id(), stream->results());
    stream->start();
    return stream;
  }

#define KVFERRY_TWIN(Name, field)                                                    \
  grpc::ServerUnaryReactor* Name(Context* context, const v1::Name##Request* request, \
                                 v1::Name##Response* response) override {            \
    v1::Operation operation;                                                         \
    operation.set_op_id(1);                                                          \
    *operation.mutable_##field() = *request;                                         \
    return twin(context, operation, response);                                       \
  }
  KVFERRY_TWIN(OpenSend, open_send)
  KVFERRY_TWIN(Send, send)
  KVFERRY_TWIN(Receive, receive)
  KVFERRY_TWIN(Claim, claim)
  KVFERRY_TWIN(Decline, decline)
  KVFERRY_TWIN(CloseTransfer, close_transfer)
  KVFERRY_TWIN(CommitReuse, commit_reuse)
#undef KVFERRY_TWIN

  grpc::ServerWriteReactor<v1::WatchResponse>* Watch(Context* context,
                                                     const v1::WatchRequest*) override {
    const SessionPtr session = session_of(*context);
    if (session == nullptr) return WatchStream::refuse(to_status(*context, unauthenticated()));
    auto stream = WatchStream::start(session);
    if (!stream) return WatchStream::refuse(to_status(*context, stream.error()));
    if (config_.on_answer) config_.on_answer(Code::kOk);
    return *stream;
  }

 private:
  static Error unauthenticated() {
    return Error{static_cast<Code>(grpc::StatusCode::UNAUTHENTICATED), "TOKEN_UNKNOWN",
                 "no attached worker has this token", "kvferry-token-bin"};
  }

  SessionPtr session_of(const Context& context) {
    const auto& metadata = context.client_metadata();
    const auto it = metadata.find(kTokenMetadata);
    if (it == metadata.end()) return nullptr;
    SessionPtr session = backend_.find_session({it->second.data(), it->second.size()});
    return session && session->facts().socket == socket_ ? session : nullptr;
  }

  static Time deadline_of(const Context& context) {
    const auto left = context.deadline() - std::chrono::system_clock::now();
    const auto most = std::chrono::minutes(10);
    return monotonic_now() +
           std::min<Duration>(std::chrono::duration_cast<Duration>(
                                  std::min<std::chrono::system_clock::duration>(left, most)),
                              most);
  }

  grpc::Status conclude(Context& context, const Status& status) {
    config_.on_answer(status ? Code::kOk : status.error().code);
    return status ? grpc::Status::OK : to_status(context, as_spelled(status.error()));
  }

  // A call that is answered before the handler returns.
  template <typename Fn>
  grpc::ServerUnaryReactor* unary(Context* context, Fn&& body) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    const SessionPtr session = session_of(*context);
    const Status status = session ? body(session) : Status(tl::unexpected(unauthenticated()));
    reactor->Finish(conclude(*context, status));
    return reactor;
  }

  // A call that `body` answers later by the function it is given, unless it returns an error.
  template <typename Fn>
  grpc::ServerUnaryReactor* deferred(Context* context, Fn&& body) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    const SessionPtr session = session_of(*context);
    const Status begun =
        session ? session->begin_call() : Status(tl::unexpected(unauthenticated()));
    if (!begun) {
      reactor->Finish(conclude(*context, begun));
      return reactor;
    }
    const auto finish = [this, context, reactor, session](Status status) {
      session->end_call();
      reactor->Finish(conclude(*context, status));
    };
    if (const Status started = body(session, finish); !started) finish(started);
    return reactor;
  }

  template <typename Response>
  grpc::ServerUnaryReactor* twin(Context* context, const v1::Operation& operation,
                                 Response* response) {
    return deferred(context, [&](const SessionPtr& session, auto finish) -> Status {
      submit(session, operation, [response, finish](v1::OperationResult result) {
        if (result.outcome() == v1::OPERATION_OUTCOME_REJECTED) {
          const v1::ErrorDetail& detail = result.error();
          finish(fail(static_cast<Code>(detail.code()), detail.reason(), detail.message(),
                      detail.field()));
          return;
        }
        *response->mutable_result() = std::move(result);
        finish({});
      });
      return {};
    });
  }

  Result<LayoutView> layout_of(const Session& session, const v1::LayoutRef& ref, bool given) {
    if (!given && session.facts().role == lifeline::Role::kController)
      return fail(Code::kPermissionDenied, "ROLE_WITHOUT_TRANSFERS",
                  "a controller has no layout, and so no transfers of its own", "layout");
    if (!given) return invalid("layout", "MISSING", "names the caller's own layout");
    return backend_.find_layout(session, ref.instance(), ref.rank());
  }

  // Of a Claim or Decline. A controller has no layout: towards the sender it is a receiver of its
  // own, of no incarnation. Declining, it takes a place that is free, and none that is not.
  template <typename Request>
  Result<LayoutView> speaker_of(const Session& session, const Request& request) {
    if (request.has_layout() || session.facts().role != lifeline::Role::kController)
      return layout_of(session, request.layout(), request.has_layout());
    auto handle = std::make_shared<engine::LayoutHandle>();
    handle->worker = session.id();
    handle->instance = session.facts().tenant + "/" + session.facts().name;
    return LayoutView{std::move(handle), nullptr};
  }

  // A controller asks for the layout of any worker of its tenant, within the domain of the key that
  // it shows.
  Result<LayoutView> reuse_layout_of(const Session& session,
                                     const v1::LookupReuseRequest& request) {
    if (session.facts().role != lifeline::Role::kController) {
      if (!request.reuse_key().empty())
        return invalid("reuse_key", "UNEXPECTED",
                       "the worker's layout was registered with its key");
      return layout_of(session, request.layout(), request.has_layout());
    }
    if (!request.has_layout())
      return invalid("layout", "MISSING", "names the layout that would receive");
    Secret key;
    KVFERRY_RETURN_IF_ERROR(take16(request.reuse_key(), "reuse_key", key));
    return backend_.find_reuse_layout(session, request.layout().instance(), request.layout().rank(),
                                      key);
  }

  Result<TicketFacts> ticket_of(const Session& session, const std::string& ticket) {
    KVFERRY_RETURN_IF_ERROR(check_ticket_text(ticket));
    return backend_.parse_ticket(session, ticket);
  }

  Result<engine::Event> to_event(const Session& session, const v1::Operation& operation) {
    const OpLimits limits = limits_.get();
    const auto as_event = [&](auto result) -> Result<engine::Event> {
      if (!result) return tl::unexpected(result.error());
      result->op.worker = session.id();
      return engine::Event(std::move(*result));
    };
    const auto layout = [&](const auto& request) {
      return layout_of(session, request.layout(), request.has_layout());
    };
    switch (operation.kind_case()) {
      case v1::Operation::kOpenSend: {
        auto view = layout(operation.open_send());
        KVFERRY_RETURN_IF_ERROR(view);
        return as_event(to_open_send(operation.open_send(), *view, limits));
      }
      case v1::Operation::kSend: {
        auto view = layout(operation.send());
        KVFERRY_RETURN_IF_ERROR(view);
        return as_event(to_send(operation.send(), *view, limits));
      }
      case v1::Operation::kReceive: {
        auto view = layout(operation.receive());
        KVFERRY_RETURN_IF_ERROR(view);
        auto ticket = ticket_of(session, operation.receive().ticket());
        KVFERRY_RETURN_IF_ERROR(ticket);
        return as_event(to_receive(operation.receive(), *view, *ticket, limits));
      }
      case v1::Operation::kClaim: {
        auto view = speaker_of(session, operation.claim());
        KVFERRY_RETURN_IF_ERROR(view);
        auto ticket = ticket_of(session, operation.claim().ticket());
        KVFERRY_RETURN_IF_ERROR(ticket);
        return as_event(to_claim(operation.claim(), *view, *ticket, limits));
      }
      case v1::Operation::kDecline: {
        auto view = speaker_of(session, operation.decline());
        KVFERRY_RETURN_IF_ERROR(view);
        auto ticket = ticket_of(session, operation.decline().ticket());
        KVFERRY_RETURN_IF_ERROR(ticket);
        return as_event(to_decline(operation.decline(), *view, *ticket));
      }
      case v1::Operation::kCloseTransfer: {
        KVFERRY_RETURN_IF_ERROR(check_handle(operation.close_transfer().client_handle()));
        engine::CloseOp op;
        op.client_handle = operation.close_transfer().client_handle();
        return as_event(Result<engine::CloseOp>(op));
      }
      case v1::Operation::kCommitReuse:
        return as_event(to_commit_reuse(operation.commit_reuse()));
      case v1::Operation::KIND_NOT_SET:
        break;
    }
    return invalid("kind", "MISSING", "an operation names its kind");
  }

  // Answers once by `answer`, possibly on another thread.
  template <typename Answer>
  void submit(const SessionPtr& session, const v1::Operation& operation, Answer answer) {
    const uint64_t op_id = operation.op_id();
    const auto refuse = [&](const Error& error) {
      v1::OperationResult result;
      fill(error, op_id, result);
      answer(std::move(result));
    };
    if (op_id == 0) {
      config_.on_answer(Code::kInvalidArgument);
      refuse(
          Error{Code::kInvalidArgument, "OP_ID_ZERO", "operations are numbered from 1", "op_id"});
      return;
    }
    Result<engine::Event> event = to_event(*session, operation);
    if (!event) {
      config_.on_answer(event.error().code);
      refuse(event.error());
      return;
    }
    backend_.call(session->id(), std::move(*event),
                  [this, op_id, answer](const engine::Reply& reply) {
                    config_.on_answer(reply.error.code);
                    v1::OperationResult result;
                    fill(reply, op_id, result);
                    answer(std::move(result));
                  });
  }

  void replace_stream(WorkerId worker, const std::shared_ptr<SubmitStream::Results>& results) {
    std::shared_ptr<SubmitStream::Results> old;
    {
      MutexLock lock(mutex_);
      std::erase_if(streams_, [](const auto& entry) { return entry.second.expired(); });
      std::weak_ptr<SubmitStream::Results>& current = streams_[worker];
      old = current.lock();
      current = results;
    }
    if (old) old->finish({grpc::StatusCode::ABORTED, "SUBMIT_REPLACED by a newer stream"});
  }

  WorkerBackend& backend_;
  const WorkerServerConfig& config_;
  const CurrentLimits& limits_;
  const std::size_t socket_;
  Mutex mutex_;
  std::map<WorkerId, std::weak_ptr<SubmitStream::Results>> streams_ KVFERRY_GUARDED_BY(mutex_);
};

struct WorkerServer::Impl {
  WorkerServerConfig config;
  CurrentLimits limits;
  std::vector<std::unique_ptr<Service>> services;
  std::vector<std::unique_ptr<grpc::Server>> servers;
  bool stopped = false;
};

WorkerServer::WorkerServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

WorkerServer::~WorkerServer() {
  shutdown(monotonic_now() + std::chrono::seconds(1));
}

Result<std::unique_ptr<WorkerServer>> WorkerServer::start(const WorkerServerConfig& config,
                                                          WorkerBackend& backend) {
  auto impl = std::make_unique<Impl>();
  impl->config = config;
  impl->limits.set(config.limits);
  if (!impl->config.on_answer) impl->config.on_answer = [](Code) {};
  grpc::EnableDefaultHealthCheckService(true);
  static const bool reflection = [] {
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    return true;
  }();
  (void)reflection;
  for (const WorkerServerConfig::Socket& socket : impl->config.sockets) {
    if (somebody_listens(socket.path))
      return fail(Code::kUnavailable, "LISTEN_FAILED",
                  "cannot listen on " + socket.path + ": another daemon serves it");
    auto service = std::make_unique<Service>(backend, impl->config, impl->limits, socket.index);
    ::unlink(socket.path.c_str());
    // The socket is made under a mask that lets nobody in, then opened to its mode.
    const mode_t mask = ::umask(0177);
    grpc::ServerBuilder builder;
    builder.AddListeningPort("unix:" + socket.path, grpc::InsecureServerCredentials());
    builder.RegisterService(service.get());
    builder.SetMaxReceiveMessageSize(8 << 20);
    // A window that is large enough from the start, instead of one that grows with what pings
    // measure: after each message read they woke both sides twice.
    builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1 << 20);
    builder.SetResourceQuota(grpc::ResourceQuota("workers").Resize(512 << 20).SetMaxThreads(64));
    std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
    ::umask(mask);
    if (!server || ::chmod(socket.path.c_str(), socket.mode) != 0)
      return fail(Code::kUnavailable, "LISTEN_FAILED", "cannot listen on " + socket.path);
    impl->services.push_back(std::move(service));
    impl->servers.push_back(std::move(server));
  }
  return std::unique_ptr<WorkerServer>(new WorkerServer(std::move(impl)));
}

void WorkerServer::set_limits(const OpLimits& limits) {
  impl_->limits.set(limits);
}

void WorkerServer::set_serving(bool serving) {
  for (auto& server : impl_->servers)
    if (auto* health = server->GetHealthCheckService()) health->SetServingStatus(serving);
}

void WorkerServer::shutdown(Time deadline) {
  if (std::exchange(impl_->stopped, true)) return;
  const auto left = std::max<Duration>(deadline - monotonic_now(), Duration{});
  const auto until = std::chrono::system_clock::now() +
                     std::chrono::duration_cast<std::chrono::system_clock::duration>(left);
  for (auto& server : impl_->servers) server->Shutdown(until);
  for (auto& server : impl_->servers) server->Wait();
}

}  // namespace kvferry::rpc
