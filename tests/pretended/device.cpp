// The device half of pretended_gpu: tensors of device type CUDA that live in host memory. Every operator runs its CPU
// kernel on host tensors over the same memory, after what CUDA would refuse has been refused; launches and
// synchronisations are counted, and graphs record operators in order to run them again.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>
#include <thread>

using at::Tensor;
using c10::Device;
using c10::DispatchKey;
using c10::IValue;
using Names = std::set<std::string>;

namespace {

const auto kCuda = c10::DeviceType::CUDA;
const int kDevices = 8;
thread_local c10::DeviceIndex current = 0;  // as in CUDA, each thread has its own

at::Generator& generator() {
  static at::Generator own = at::detail::createCPUGenerator(67280421310721);
  return own;
}

// ---- what PyTorch asks of a device ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(Device d) { return c10::Stream(c10::Stream::DEFAULT, Device(kCuda, d.has_index() ? d.index() : current)); }
  c10::DeviceType type() const override { return kCuda; }
  Device exchangeDevice(Device to) const override { Device was(kCuda, current); setDevice(to); return was; }
  Device getDevice() const override { return {kCuda, current}; }
  void setDevice(Device to) const override { if (to.has_index()) current = to.index(); }
  void uncheckedSetDevice(Device to) const noexcept override { if (to.has_index()) current = to.index(); }
  c10::Stream getStream(Device d) const override { return stream(d); }
  c10::Stream getDefaultStream(Device d) const override { return stream(d); }
  c10::Stream getNewStream(Device d, int) const override { return stream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* owner = new c10::DataPtr(c10::GetAllocator(c10::DeviceType::CPU)->allocate(bytes));
    return {owner->get(), owner, [](void* p) { delete static_cast<c10::DataPtr*>(p); }, Device(kCuda, current)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
} memory;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex current_device() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex to) const override { current = to; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex to) const override { return std::exchange(current, to); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex to) const override { return std::exchange(current, to); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  Device getDeviceFromPtr(void*) const override { return {kCuda, current}; }
};

// ---- the same memory seen from either side ----

c10::Storage other_side(const c10::Storage& storage, Device device) {
  auto* owner = new c10::Storage(storage);
  c10::DataPtr data(const_cast<void*>(storage.data()), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, device);
  bool host = device.is_cpu();
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), host ? c10::GetAllocator(device.type()) : nullptr, host};
}

Tensor over(c10::Storage storage, const Tensor& like, DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

Tensor host_view(const Tensor& tensor) {
  at::NoGradGuard no_grad;
  return over(other_side(tensor.storage(), c10::kCPU), tensor, DispatchKey::CPU);
}

// ---- counting, and graphs ----

std::mutex lock;
std::map<std::string, int64_t> launched;
PyObject* listener = nullptr;  // told of every synchronisation

// What the device does, by the phase that Python has named and, in backward passes (threads of their own), that: one
// number for each different (phase, kind, a, b). Kernels: a floating-point operations, b bytes read and written. Copies
// between host and device: b bytes. Tokens: rows looked up in a table of a rows.
using Done = std::tuple<std::string, std::string, int64_t, int64_t>;
std::map<Done, int64_t> done;
std::string phase;
const auto main_thread = std::this_thread::get_id();

void account(const char* kind, int64_t a, int64_t b, int64_t times = 1) {
  std::lock_guard<std::mutex> guard(lock);
  const bool backward = std::this_thread::get_id() != main_thread;
  done[{backward ? phase + " backward" : phase, kind, a, b}] += times;
}

struct Work {
  int64_t flops = 0, bytes = 0, tokens = 0, table = 0;

  void account_kernel() const {
    account("kernel", flops, bytes);
    if (tokens) account("token", table, 0, tokens);
  }
};

struct Recorded {
  c10::OperatorHandle op;
  torch::jit::Stack inputs;      // on the host's side
  std::vector<Tensor> results;   // of a capture, made anew by each replay
  Work work;
};

struct Graph {
  std::vector<Recorded> calls;
  void replay();
};
Graph* capturing = nullptr;

void launch(const std::string& name) {
  account("launch", 0, 0);
  std::lock_guard<std::mutex> guard(lock);
  launched[name]++;
}

void synchronise(const std::string& why) {
  TORCH_CHECK(!capturing, "pretended CUDA: operation not permitted when stream is capturing (", why, ")");
  account("wait", 0, 0);
  if (!listener) return;
  py::gil_scoped_acquire gil;
  py::object(py::reinterpret_borrow<py::object>(listener))(why);
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  c10::impl::ExcludeDispatchKeyGuard no_views(c10::DispatchKeySet(DispatchKey::ADInplaceOrView));
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
}

void visit(const IValue& value, const std::function<void(const Tensor&)>& see) {
  if (value.isTensor()) { if (value.toTensor().defined()) see(value.toTensor()); }
  else if (value.isList()) { for (const IValue& entry : value.toListRef()) visit(entry, see); }
}

void Graph::replay() {
  launch("cudaGraphLaunch");
  for (auto& call : calls) {
    torch::jit::Stack stack = call.inputs;
    run_on_host(call.op, &stack);
    call.work.account_kernel();
    size_t next = 0;
    for (const IValue& value : stack)
      visit(value, [&](const Tensor& fresh) {
        const Tensor& kept = call.results[next++];
        if (kept.data_ptr() != fresh.data_ptr()) kept.copy_(fresh);
      });
  }
}

// ---- every operator ----

// Views and questions, which launch nothing.
const Names without_kernel = {"view", "as_strided", "_reshape_alias", "unfold", "empty", "empty_strided", "set_", "resize_", "result_type", "_fused_sdp_choice", "_has_compatible_shallow_copy_type"};
// The host waits for what they find.
const Names waiting = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive", "is_nonzero"};
// CUDA's kernels take one number from the host, besides the pointwise ones, which are known by their tag.
const Names number_from_host = {"fill_", "masked_fill_", "masked_fill", "where", "result_type", "add", "sub", "mul", "div", "lerp_", "lerp"};
// They read or write as many rows of their first argument as there are indices, not all of it.
const Names looking_up = {"index", "index_select", "gather", "index_put_", "_index_put_impl_", "index_copy_", "scatter_", "scatter_add_"};
const Names indexing = {"index", "index_put", "index_put_", "_index_put_impl_"};

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack), name_(op.schema().name().substr(6)) {}

  void run() {
    const auto& arguments = op_.schema().arguments();
    const size_t first = stack_->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); i++) {
      argument_ = arguments[i].name();
      (*stack_)[first + i] = to_host((*stack_)[first + i]);
    }
    TORCH_CHECK(stranger_.empty() || seen_.empty(), "pretended CUDA: Expected all tensors to be on the same device, but found at least two devices, ", target_ ? target_->str() : "cuda", " and cpu! (argument ", stranger_, " of ", name_, ")");
    if (target_ && !asked_for_host_)
      for (size_t i = 0; i < arguments.size(); i++)
        if (arguments[i].name() == "generator" && (*stack_)[first + i].isNone()) (*stack_)[first + i] = generator();
    if (name_ == "_fused_sdp_choice") { torch::jit::drop(*stack_, arguments.size()); stack_->push_back(int64_t(0)); return; }
    if (!without_kernel.count(name_)) launch(name_);
    if (waiting.count(name_) || (indexing.count(name_) && by_mask_)) synchronise(name_);
    if (name_ == "copy_" && of_host_) {
      bool to_host = std::none_of(seen_.begin(), seen_.end(), [&](const auto& one) { return one.second.host.is_same((*stack_)[first].toTensor()); });
      TORCH_CHECK(!capturing, "pretended CUDA: a copy between host and device while a stream is capturing");
      account("host", 0, int64_t((*stack_)[first].toTensor().nbytes()));
      if (to_host) synchronise("copy to the host"); else launch("copy from the host");
    }
    torch::jit::Stack inputs(stack_->begin() + first, stack_->end());
    run_on_host(op_, stack_);
    const size_t results = stack_->size() - op_.schema().returns().size();
    if (!without_kernel.count(name_)) {
      const Work work = work_of(inputs, results);
      if (capturing) record(std::move(inputs), results, work);
      work.account_kernel();
    }
    follow_resizes();
    for (size_t i = results; i < stack_->size(); i++) (*stack_)[i] = to_device((*stack_)[i]);
  }

 private:
  struct Pair { Tensor device, host; c10::StorageImpl* host_storage; };

  IValue to_host(const IValue& value) {
    if (value.isTensor()) return host_of(value.toTensor());
    if (value.isDevice()) {
      asked_for_host_ = value.toDevice().is_cpu();
      if (value.toDevice().type() != kCuda) return value;
      if (!target_) target_ = Device(kCuda, value.toDevice().has_index() ? value.toDevice().index() : current);
      return Device(c10::kCPU);
    }
    if (value.isTensorList()) {
      c10::List<Tensor> hosts;
      for (const Tensor& tensor : value.toTensorVector()) hosts.push_back(host_of(tensor));
      return hosts;
    }
    if (value.isList() && value.toList().elementType()->str().find("Tensor") != std::string::npos) {
      c10::List<std::optional<Tensor>> hosts;
      for (const IValue& entry : value.toListRef()) {
        if (entry.isNone()) { hosts.push_back(std::nullopt); continue; }
        by_mask_ |= entry.toTensor().defined() && entry.toTensor().scalar_type() == at::kBool;
        hosts.push_back(host_of(entry.toTensor()));
      }
      return hosts;
    }
    return value;
  }

  Tensor host_of(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().is_cpu()) {
      of_host_ = true;
      bool number = tensor.dim() == 0 && (op_.hasTag(at::Tag::pointwise) || number_from_host.count(name_));
      bool index = indexing.count(name_) && (argument_ == "indices" || tensor.dim() == 0);
      if (!number && !index && name_ != "copy_") stranger_ = argument_;
      return tensor;
    }
    if (tensor.device().type() != kCuda) return tensor;
    TORCH_CHECK(!target_ || *target_ == tensor.device(), "pretended CUDA: tensors on ", target_->str(), " and ", tensor.device().str(), " in ", name_);
    target_ = tensor.device();
    auto found = seen_.find(tensor.unsafeGetTensorImpl());
    if (found != seen_.end()) return found->second.host;
    // One host storage for each of the device's: what overlaps there overlaps here.
    Tensor host;
    for (auto& [_, pair] : seen_)
      if (pair.device.storage().is_alias_of(tensor.storage())) { host = over(pair.host.storage(), tensor, DispatchKey::CPU); break; }
    if (!host.defined()) host = over(other_side(tensor.storage(), c10::kCPU), tensor, DispatchKey::CPU);
    seen_.emplace(tensor.unsafeGetTensorImpl(), Pair{tensor, host, host.storage().unsafeGetStorageImpl()});
    return host;
  }

  // out= and resize_ may give a tensor another shape or other memory.
  void follow_resizes() {
    for (auto& [impl, pair] : seen_) {
      if (pair.host.storage().data() != pair.device.storage().data() || pair.host.storage().nbytes() != pair.device.storage().nbytes())
        impl->set_storage_keep_dtype(other_side(pair.host.storage(), *target_));
      if (pair.host.sizes() != pair.device.sizes() || pair.host.strides() != pair.device.strides() || pair.host.storage_offset() != pair.device.storage_offset())
        impl->set_sizes_and_strides(pair.host.sizes(), pair.host.strides(), pair.host.storage_offset());
    }
  }

  IValue to_device(const IValue& value) {
    if (value.isTensorList()) {
      c10::List<Tensor> devices;
      for (const Tensor& tensor : value.toTensorVector()) devices.push_back(device_of(tensor));
      return devices;
    }
    return value.isTensor() ? IValue(device_of(value.toTensor())) : value;
  }

  Tensor device_of(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu() || !target_) return tensor;
    for (auto& [_, pair] : seen_)
      if (pair.host.is_same(tensor)) return pair.device;
    for (auto& [_, pair] : seen_)
      if (tensor.has_storage() && pair.host_storage == tensor.storage().unsafeGetStorageImpl()) return over(pair.device.storage(), tensor, DispatchKey::CUDA);
    if (asked_for_host_ || name_ == "copy_") return tensor;
    return over(other_side(tensor.storage(), *target_), tensor, DispatchKey::CUDA);
  }

  // Products of matrices are 2 m k n operations, all else is only its bytes.
  Work work_of(const torch::jit::Stack& inputs, size_t first_result) const {
    Work work;
    std::vector<Tensor> tensors;
    const bool looks_up = looking_up.count(name_);
    size_t place = 0;
    const Tensor* table = looks_up && inputs[0].isTensor() ? &inputs[0].toTensor() : nullptr;
    auto add = [&](const Tensor& tensor) {
      if (table && tensor.is_alias_of(*table)) return;
      // What is broadcast is read once.
      if (tensor.has_storage()) work.bytes += std::min<int64_t>(tensor.numel() * tensor.itemsize(), tensor.storage().nbytes());
    };
    for (const IValue& input : inputs) visit(input, [&](const Tensor& tensor) { tensors.push_back(tensor); });
    for (const Tensor& tensor : tensors) add(tensor);
    for (size_t i = first_result; i < stack_->size(); i++) visit((*stack_)[i], [&](const Tensor& tensor) { add(tensor); if (looks_up) add(tensor); });
    if (name_ == "mm" || name_ == "bmm" || name_ == "mv") place = 1;
    if (name_ == "addmm" || name_ == "baddbmm" || name_ == "addmv") place = 2;
    if (place && tensors.size() > place)
      work.flops = 2 * tensors[place - 1].numel() * (tensors[place].dim() > 1 ? tensors[place].size(-1) : 1);
    // What an embedding is, below.
    if (name_ == "index_select" && tensors[0].dim() == 2 && tensors[0].is_floating_point()) work.table = tensors[0].size(0), work.tokens = tensors[1].numel();
    return work;
  }

  void record(torch::jit::Stack inputs, size_t first_result, const Work& work) {
    std::vector<Tensor> results;
    for (size_t i = first_result; i < stack_->size(); i++) visit((*stack_)[i], [&](const Tensor& tensor) { results.push_back(tensor); });
    capturing->calls.push_back({op_, std::move(inputs), std::move(results), work});
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  std::string name_, argument_, stranger_;
  std::map<c10::TensorImpl*, Pair> seen_;
  std::optional<Device> target_;  // where results go
  bool of_host_ = false, by_mask_ = false, asked_for_host_ = false;
};

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { Call(op, stack).run(); }

Tensor& set_part(Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size).vec(), strides = C10_AS_INTARRAYREF_SLOW(stride).vec();
  if (strides.empty()) {
    strides.resize(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  }
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset.expect_int());
  return self;
}

Tensor& set_whole(Tensor& self, c10::Storage source) {
  c10::SymInt count(int64_t(source.nbytes() / self.dtype().itemsize())), one(1);
  return set_part(self, std::move(source), 0, {count}, {one});
}

// Products of 16-bit matrices in fp32, which only CUDA has.
Tensor& product(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) {
  launch("mm");
  Work{2 * a.numel() * b.size(-1), int64_t(a.nbytes() + b.nbytes() + out.nbytes())}.account_kernel();
  host_view(out).copy_(host_view(a).to(dtype).matmul(host_view(b).to(dtype)));
  return out;
}

Tensor& sum_and_product(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  launch("addmm");
  Work{2 * a.numel() * b.size(-1), int64_t(c.nbytes() + a.nbytes() + b.nbytes() + out.nbytes())}.account_kernel();
  host_view(out).copy_(host_view(c).to(dtype) * beta + host_view(a).to(dtype).matmul(host_view(b).to(dtype)) * alpha);
  return out;
}

}  // namespace

namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }
namespace c10 { static AllocatorRegisterer<DeviceType::CUDA> pretended_memory(&memory); }
namespace at { using PretendedHooks = ::Hooks; C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks) }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // Composite kernels that would look for CUDA's own below them.
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("_fused_sdp_choice", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  for (auto name : {"mm.dtype_out", "bmm.dtype_out"}) m.impl(name, &product);
  m.impl("addmm.dtype_out", &sum_and_product);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Storage_storage_offset", &set_part);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("launched", [] { std::lock_guard<std::mutex> guard(lock); return launched; });
  m.def("done", [] { std::lock_guard<std::mutex> guard(lock); return done; });
  m.def("account", [](const std::string& kind, int64_t a, int64_t b, int64_t times) { account(kind.c_str(), a, b, times); });
  m.def("name_phase", [](const std::string& name) { std::lock_guard<std::mutex> guard(lock); phase = name; });
  m.def("listen", [](py::object f) { Py_XDECREF(listener); listener = f.release().ptr(); });
  m.def("host_view", &host_view);
  m.def("generator", [] { return generator(); });
  m.def("current", [] { return int(current); });
  m.def("set_current", [](int to) { current = c10::DeviceIndex(to); });
  py::class_<Graph>(m, "Graph")
      .def(py::init<>())
      .def("begin", [](Graph& graph) { capturing = &graph; })
      .def("end", [](Graph&) { capturing = nullptr; })
      .def("replay", &Graph::replay)
      .def_property_readonly("calls", [](Graph& graph) { return graph.calls.size(); });
}
