// The wrapper's core: one call a unit and hook. The GIL is released wherever a collective may be
// waited for; the callbacks that Python hands in take it themselves. The same calls are none of a
// transform's in which they may be made.
#include <pybind11/functional.h>
#include <torch/csrc/utils/pybind.h>

#include "base/shard_rows.h"
#include "hsdp/outside_of_transforms.h"
#include "hsdp/param_group.h"
#include "hsdp/peers.h"
#include "hsdp/pending_works.h"
#include "hsdp/schedule.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {

using NoGil = py::call_guard<py::gil_scoped_release, hsdp::OutsideOfTransforms>;

namespace {

void BindValues(py::module_& module) {
  py::enum_<hsdp::BackwardPrefetch>(module, "BackwardPrefetch")
      .value("NONE", hsdp::BackwardPrefetch::kNone)
      .value("PRE", hsdp::BackwardPrefetch::kPre)
      .value("POST", hsdp::BackwardPrefetch::kPost);
  py::enum_<hsdp::ReshardAfterForward>(module, "ReshardAfterForward")
      .value("UNLESS_BACKWARD_IS_NEXT", hsdp::ReshardAfterForward::kUnlessBackwardIsNext)
      .value("ALWAYS", hsdp::ReshardAfterForward::kAlways)
      .value("NEVER", hsdp::ReshardAfterForward::kNever);
  py::enum_<hsdp::ReadTurn>(module, "ReadTurn")
      .value("TAKEN", hsdp::ReadTurn::kTaken)
      .value("HELD", hsdp::ReadTurn::kHeld)
      .value("BUSY", hsdp::ReadTurn::kBusy);
  py::enum_<hsdp::ShardMemory>(module, "ShardMemory")
      .value("DEVICE", hsdp::ShardMemory::kDevice)
      .value("HOST", hsdp::ShardMemory::kHost)
      .value("PINNED", hsdp::ShardMemory::kPinned);
  py::enum_<hsdp::GradAccumulation>(module, "GradAccumulation")
      .value("COMPUTED", hsdp::GradAccumulation::kComputed)
      .value("REDUCED", hsdp::GradAccumulation::kReduced)
      .value("REDUCED_BY_AUTOGRAD", hsdp::GradAccumulation::kReducedByAutograd);
  py::class_<hsdp::Precision>(module, "UnitPrecision")
      .def(py::init([](std::optional<at::ScalarType> reduce_dtype, bool keep_low_precision_grads,
                       hsdp::GradAccumulation accumulation) {
             return hsdp::Precision{reduce_dtype, keep_low_precision_grads, accumulation};
           }),
           py::kw_only(), py::arg("reduce_dtype") = py::none(),
           py::arg("keep_low_precision_grads") = false,
           py::arg("accumulation") = hsdp::GradAccumulation::kComputed);
  py::class_<hsdp::StoredParam>(module, "StoredParam")
      .def(py::init([](std::vector<int64_t> sizes, int64_t dim, at::ScalarType dtype,
                       std::optional<at::ScalarType> param_dtype, bool is_summed_elsewhere,
                       bool is_dtensor, bool is_extended) {
             return hsdp::StoredParam{{std::move(sizes), dim}, dtype,      param_dtype,
                                      is_summed_elsewhere,     is_dtensor, is_extended};
           }),
           py::kw_only(), py::arg("sizes"), py::arg("dim"), py::arg("dtype"),
           py::arg("param_dtype") = py::none(), py::arg("is_summed_elsewhere") = false,
           py::arg("is_dtensor") = false, py::arg("is_extended") = false);
  py::class_<hsdp::Extension>(module, "Extension")
      .def(py::init([](std::function<void()> start, std::function<void()> finish,
                       std::function<void()> free) {
             return hsdp::Extension{std::move(start), std::move(finish), std::move(free)};
           }),
           py::kw_only(), py::arg("start"), py::arg("finish"), py::arg("free"));
  py::class_<base::ShardRows>(module, "ShardRows")
      .def_readonly("first", &base::ShardRows::first)
      .def_readonly("count", &base::ShardRows::count);
  module.def("shard_rows", &base::RowsOfShard, py::arg("rows"), py::arg("shards"),
             py::arg("shard"));
}

void BindCommunication(py::module_& module) {
  py::class_<hsdp::Collectives, std::shared_ptr<hsdp::Collectives>>(module, "Collectives")
      .def(py::init<std::string, std::optional<std::string>, int64_t>(), py::arg("shard_group"),
           py::arg("replica_group"), py::arg("rank"))
      .def("set_reduce_groups", &hsdp::Collectives::SetReduceGroups, py::arg("shard_group"),
           py::arg("replica_group"))
      .def(
          "set_peers",
          [](hsdp::Collectives& self, const hsdp::Peers& peers) {
            self.SetDepartures(peers.departures());
          },
          py::arg("peers"));

  py::class_<hsdp::Peers, std::shared_ptr<hsdp::Peers>>(module, "Peers")
      .def(py::init<std::string, std::vector<int64_t>, int64_t>(), py::arg("group"),
           py::arg("ranks"), py::arg("channel"));
  module.def("keep_if_pending", &hsdp::KeepIfPending, py::arg("group"));
}

using UnitClass = py::class_<hsdp::Unit, std::shared_ptr<hsdp::Unit>>;

std::shared_ptr<hsdp::Unit> MakeUnit(std::vector<hsdp::StoredParam> parameters, at::Device device,
                                     std::shared_ptr<hsdp::Collectives> collectives,
                                     hsdp::Precision precision, std::function<void()> on_backward,
                                     std::function<void()> on_reduced, hsdp::LocalGrad local_grad,
                                     std::optional<hsdp::Extension> extension,
                                     hsdp::ShardMemory memory) {
  auto unit = std::make_shared<hsdp::Unit>();
  unit->group = std::make_shared<hsdp::ParamGroup>(std::move(parameters), precision, device,
                                                   std::move(collectives), std::move(local_grad),
                                                   extension.value_or(hsdp::Extension{}), memory);
  unit->on_backward = std::move(on_backward);
  unit->on_reduced = std::move(on_reduced);
  return unit;
}

void BindUnitSettings(UnitClass& unit_class) {
  unit_class
      .def(
          "set_all_reduce",
          [](hsdp::Unit& unit, bool all_reduce) {
            unit.group->reduce_options().all_reduce = all_reduce;
          },
          py::arg("all_reduce"))
      .def(
          "set_divide_factor",
          [](hsdp::Unit& unit, std::optional<double> factor) {
            unit.group->reduce_options().divide_factor = factor;
          },
          py::arg("factor"))
      .def(
          "set_all_reduce_hook",
          [](hsdp::Unit& unit, std::function<void(const at::Tensor&)> hook) {
            unit.group->reduce_options().all_reduce_hook = std::move(hook);
          },
          py::arg("hook"))
      .def(
          "set_gather_comm",
          [](hsdp::Unit& unit, hsdp::CustomComm::Allocate allocate, hsdp::CustomComm::Run run) {
            unit.group->SetGatherComm({std::move(allocate), std::move(run)});
          },
          py::arg("allocate"), py::arg("run"))
      .def(
          "set_reduce_comm",
          [](hsdp::Unit& unit, hsdp::CustomComm::Allocate allocate, hsdp::CustomComm::Run run) {
            unit.group->SetReduceComm({std::move(allocate), std::move(run)});
          },
          py::arg("allocate"), py::arg("run"))
      .def(
          "set_force_sum",
          [](hsdp::Unit& unit, bool force_sum) {
            unit.group->reduce_options().force_sum = force_sum;
          },
          py::arg("force_sum"))
      .def(
          "set_reshard_to",
          [](hsdp::Unit& unit, std::shared_ptr<hsdp::Collectives> fewer) {
            unit.group->SetReshardTo(std::move(fewer));
          },
          py::arg("fewer"))
      .def(
          "set_comm_hook",
          [](hsdp::Unit& unit, hsdp::CommHook hook) { unit.group->SetCommHook(std::move(hook)); },
          py::arg("hook"))
      .def_property(
          "name", [](const hsdp::Unit& unit) { return unit.group->name(); },
          [](hsdp::Unit& unit, std::string name) { unit.group->set_name(std::move(name)); })
      .def_readwrite("sync", &hsdp::Unit::sync)
      .def_readwrite("reshard_after_forward", &hsdp::Unit::reshard_after_forward)
      .def_readwrite("reshard_after_backward", &hsdp::Unit::reshard_after_backward)
      .def_property(
          "keep_memory", [](const hsdp::Unit& unit) { return unit.group->keeps_memory(); },
          [](hsdp::Unit& unit, bool keep) { unit.group->SetKeepsMemory(keep); })
      .def_readwrite("reductions_in_flight", &hsdp::Unit::reductions_in_flight)
      .def_readwrite("unshard_in_backward", &hsdp::Unit::unshard_in_backward)
      .def_readwrite("is_watched", &hsdp::Unit::is_watched)
      .def_property_readonly("is_unsharded",
                             [](const hsdp::Unit& unit) {
                               return unit.group->state() == hsdp::ParamGroup::State::kUnsharded;
                             })
      .def(
          "set_forward_prefetch",
          [](hsdp::Unit& unit, const hsdp::UnitSequence& units) {
            unit.forward_prefetch.assign(units.begin(), units.end());
          },
          py::arg("units"))
      .def(
          "set_backward_prefetch",
          [](hsdp::Unit& unit, const hsdp::UnitSequence& units) {
            unit.backward_prefetch.assign(units.begin(), units.end());
          },
          py::arg("units"));
}

void BindUnit(py::module_& module) {
  UnitClass unit_class(module, "Unit");
  unit_class.def(py::init(&MakeUnit), py::kw_only(), py::arg("parameters"), py::arg("device"),
                 py::arg("collectives"), py::arg("precision"), py::arg("on_backward"),
                 py::arg("on_reduced"), py::arg("local_grad"), py::arg("extension") = py::none(),
                 py::arg("memory") = hsdp::ShardMemory::kDevice);
  BindUnitSettings(unit_class);
  unit_class
      .def(
          "shard",
          [](hsdp::Unit& unit, const std::vector<at::Tensor>& full) {
            return unit.group->ShardFull(full);
          },
          py::arg("full"), NoGil())
      .def(
          "rebind",
          [](hsdp::Unit& unit, const std::vector<at::Tensor>& shards, at::Device device) {
            return unit.group->Rebind(shards, device);
          },
          py::arg("shards"), py::arg("device"), NoGil())
      .def(
          "empty_full", [](const hsdp::Unit& unit) { return unit.group->EmptyFull(); }, NoGil())
      .def(
          "drop_kept", [](hsdp::Unit& unit) { unit.group->DropKept(); }, NoGil())
      .def("join_grads", [](hsdp::Unit& unit) { unit.group->reducer().Join(); })
      .def("empty_grads",
           [](const hsdp::Unit& unit) { return unit.group->reducer().EmptyShards(); })
      .def(
          "free_grads",
          [](hsdp::Unit& unit, const std::vector<at::Tensor>& shards) {
            unit.group->reducer().FreeShards(shards);
          },
          py::arg("shards"), NoGil())
      .def(
          "unused", [](const hsdp::Unit& unit) { return unit.group->reducer().Unused(); }, NoGil())
      .def(
          "write_grads",
          [](hsdp::Unit& unit, const std::vector<std::optional<at::Tensor>>& targets,
             const std::vector<bool>& accumulate) {
            unit.group->reducer().Write(targets, accumulate);
          },
          py::arg("targets"), py::arg("accumulate"), NoGil());
}

void AddUnit(hsdp::Schedule& schedule, const hsdp::UnitPtr& unit,
             const std::vector<at::Tensor>& full,
             const std::vector<std::optional<at::Tensor>>& memory, std::vector<size_t> trainable) {
  TORCH_CHECK(full.size() == memory.size(), "Schedule.add: ", full.size(), " parameters and ",
              memory.size(), " tensors for them");
  std::vector<hsdp::FullParam> params;
  for (size_t i = 0; i < full.size(); ++i)
    params.push_back({full[i], memory[i].value_or(at::Tensor())});
  schedule.Add(unit, std::move(params), std::move(trainable));
}

void BindSchedule(py::module_& module) {
  py::class_<hsdp::Schedule, std::shared_ptr<hsdp::Schedule>>(module, "Schedule")
      .def(py::init<hsdp::BackwardPrefetch, int64_t, std::shared_ptr<hsdp::Peers>,
                    std::function<void()>>(),
           py::arg("backward_prefetch"), py::arg("rank"), py::arg("peers"),
           py::arg("on_backward_end"))
      .def("add", &AddUnit, py::arg("unit"), py::arg("full"), py::arg("memory"),
           py::arg("trainable"), NoGil())
      .def("enter_forward", &hsdp::Schedule::EnterForward, py::arg("unit"), py::arg("grad_enabled"),
           NoGil())
      .def("expect_hidden_graph", &hsdp::Schedule::ExpectHiddenGraph)
      .def("leave_forward", &hsdp::Schedule::LeaveForward, py::arg("unit"), py::arg("outputs"),
           NoGil())
      .def("abort_forward", &hsdp::Schedule::AbortForward, py::arg("unit"), NoGil())
      .def("start_unshard", &hsdp::Schedule::StartUnshard, py::arg("unit"), NoGil())
      .def("unshard", &hsdp::Schedule::Unshard, py::arg("unit"), NoGil())
      .def("release", &hsdp::Schedule::Release, py::arg("unit"), NoGil())
      .def("set_last_backward", &hsdp::Schedule::SetLastBackward, py::arg("last"))
      .def("finalize_backward", &hsdp::Schedule::FinalizeBackward, py::arg("wait"), NoGil())
      .def("finish_reductions", &hsdp::Schedule::FinishReductions, NoGil())
      .def("owes", &hsdp::Schedule::Owes)
      .def(
          "take_turn", [](hsdp::Schedule& schedule) { return schedule.turn().BeginRead(); },
          NoGil())
      .def("begin_read", &hsdp::Schedule::BeginRead, NoGil())
      .def("begin_read_if_quiet", &hsdp::Schedule::BeginReadIfQuiet, NoGil())
      .def("end_read", [](hsdp::Schedule& schedule) { schedule.turn().EndRead(); })
      .def("running_here", [](hsdp::Schedule& schedule) { return schedule.turn().running_here(); })
      .def("reset", &hsdp::Schedule::Reset, NoGil());
}

}  // namespace

void BindHsdp(py::module_& module) {
  BindValues(module);
  BindCommunication(module);
  BindUnit(module);
  BindSchedule(module);
}

}  // namespace hsdp_ckpt::python
