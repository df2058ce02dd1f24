#include "daemon/node/numa_setup.h"

#include <utility>

#include "daemon/ops/log.h"

namespace kvferry::node {
namespace {

constexpr const char* kEverything = "arenas, rails, copy threads";

std::string name_of(const rails::RailSpec& rail) {
  return rail.transport + (rail.device.empty() ? "" : "/" + rail.device);
}

}  // namespace

NumaPlan NumaPlan::make(const ops::Config& config, const std::vector<rails::RailSpec>& rails,
                        const gpu::Devices* devices, const std::string& sysfs) {
  NumaPlan plan;
  plan.rails_ = rails;
  if (config.numa.bind == ops::NumaBind::kOff) {
    plan.placement_.why = "numa.bind is \"off\"";
    return plan;
  }
  auto topology = numa::Topology::load(sysfs);
  if (!topology) {
    plan.problem_ = topology.error().message;
    ops::log_warning("NUMA nodes unknown, nothing is bound to any",
                     {ops::field("error", topology.error())});
    return plan;
  }
  plan.topology_ = std::move(*topology);
  std::vector<numa::Device> rail_devices;
  for (const rails::RailSpec& rail : rails)
    rail_devices.push_back({rail.device, plan.topology_->node_of_interface(rail.device)});
  std::vector<numa::Device> gpus;
  for (std::size_t i = 0; devices != nullptr && i < devices->all().size(); ++i) {
    const gpu::DeviceFacts& facts = devices->all()[i]->facts();
    gpus.push_back(
        {"gpu" + std::to_string(facts.ordinal), plan.topology_->node_of_pci(facts.pci_bus_id)});
  }
  plan.placement_ = numa::place(plan.topology_->nodes(), rail_devices, gpus);
  ops::log_info("numa", {ops::field("nodes", plan.topology_->nodes().size()),
                         ops::field("arena", plan.binds() ? numa::to_string(plan.placement_.arena)
                                                          : std::string("not bound")),
                         ops::field("why", plan.placement_.why)});
  return plan;
}

BindMemory NumaPlan::memory_binding() const {
  if (!binds()) return nullptr;
  return [this](const void* data, uint64_t bytes) {
    return topology_->bind(data, bytes, placement_.arena);
  };
}

std::vector<CpuSet> NumaPlan::copy_cpus() const {
  std::vector<CpuSet> out;
  for (const uint32_t node : placement_.arena)
    out.push_back(numa::cpus_of(topology_->nodes(), node));
  return out;
}

CpuSet NumaPlan::rail_cpus(std::size_t rail) const {
  if (!binds() || !placement_.rails.at(rail)) return {};
  return numa::cpus_of(topology_->nodes(), *placement_.rails[rail]);
}

rpc::NumaInfo NumaPlan::describe_rail(std::size_t rail) const {
  rpc::NumaInfo row;
  row.part = "rail " + std::to_string(rail);
  if (!binds() || !placement_.rails.at(rail)) return row;
  row.place = numa::to_string({&*placement_.rails[rail], 1});
  row.reason = name_of(rails_[rail]) + ", processors " + to_string(rail_cpus(rail));
  return row;
}

std::vector<rpc::NumaInfo> NumaPlan::describe(const Arenas& arenas, int copy_errno) const {
  if (!binds()) return {{kEverything, "left to the kernel", placement_.why, problem_}};
  std::vector<rpc::NumaInfo> rows;
  const std::string place = numa::to_string(placement_.arena);
  const std::string why = topology_->own_memory_policy()
                              ? "by the memory policy that the daemon was started with"
                              : placement_.why;
  for (std::size_t i = 0; i < arenas.all().size(); ++i) {
    const Arenas::Arena& arena = arenas.all()[i];
    if (arena.device != nullptr) continue;
    rows.push_back({"arena " + std::to_string(i), place, why, arena.binding_problem});
  }
  std::string processors;
  for (const CpuSet& cpus : copy_cpus())
    processors += (processors.empty() ? "processors " : " | ") + to_string(cpus);
  rows.push_back({"copy threads", place, processors,
                  copy_errno == 0 ? std::string() : binding_error(copy_errno)});
  for (const rpc::NumaInfo& row : rows)
    if (!row.problem.empty())
      ops::log_warning("not bound to its NUMA node",
                       {ops::field("what", row.part), ops::field("where", row.place),
                        ops::field("error", row.problem)});
  return rows;
}

}  // namespace kvferry::node
