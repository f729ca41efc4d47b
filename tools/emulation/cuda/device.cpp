// A pretended libtorch_cuda: CUDA tensors in the memory of the host, computed by the CPU's operators.
//
// It also has what generated code calls of CUDA's runtime and of torch's C interface for CUDA, and
// the runner of packages for CUDA.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace {

const c10::Device gpu(c10::DeviceType::CUDA, 0);

c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());

// What torch asks its CUDA library about memory.
struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::Device getDeviceFromPtr(void*) const override { return gpu; }
};

// In the registry of torch, under the name that it looks for.
c10::Registerer<std::string, std::unique_ptr<at::CUDAHooksInterface>, at::CUDAHooksArgs> hooks(
    "CUDAHooks", at::CUDAHooksRegistry(),
    c10::Registerer<std::string, std::unique_ptr<at::CUDAHooksInterface>, at::CUDAHooksArgs>::DefaultCreator<Hooks>);

// A tensor over the same memory on another device. It keeps the original alive.
at::Tensor moved(const at::Tensor& x, const c10::Device& device) {
  auto keep = [x](void*) {};
  return at::for_blob(x.numel() ? x.mutable_data_ptr() : nullptr, x.sizes())
      .strides(x.strides())
      .deleter(keep)
      .options(x.options().device(device))
      .target_device(device)
      .make_tensor();
}

using Pairs = std::vector<std::pair<at::Tensor, at::Tensor>>;

// A tensor of the call as one of the CPU.
at::Tensor to_cpu(const at::Tensor& x, Pairs& pairs) {
  if (!x.defined() || !x.is_cuda()) return x;
  at::Tensor twin = moved(x, c10::Device(c10::DeviceType::CPU));
  pairs.emplace_back(x, twin);
  return twin;
}

// A result of the CPU as one of the call: an argument itself, or a tensor of the GPU.
at::Tensor to_gpu(const at::Tensor& x, const Pairs& pairs, bool on_gpu) {
  if (!x.defined() || !x.is_cpu()) return x;
  for (const auto& [original, twin] : pairs)
    if (twin.is_same(x)) return original;
  return on_gpu ? moved(x, gpu) : x;
}

template <class Change>
c10::IValue changed(const c10::IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& x : value.toTensorVector()) list.push_back(change(x));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& x : value.toOptionalTensorList()) {
      if (x) list.push_back(change(*x));
      else list.push_back(std::nullopt);
    }
    return list;
  }
  return value;
}

// An operator of CUDA by that of the CPU.
void by_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const size_t first = stack->size() - count;
  Pairs pairs;
  bool names_gpu = false, names_cpu = false;
  for (size_t at = first; at < stack->size(); ++at) {
    c10::IValue& value = (*stack)[at];
    if (value.isDevice()) {
      (value.toDevice().is_cuda() ? names_gpu : names_cpu) = true;
      value = c10::Device(c10::DeviceType::CPU);
    } else {
      value = changed(value, [&](const at::Tensor& x) { return to_cpu(x, pairs); });
    }
  }
  const bool on_gpu = names_gpu || (!names_cpu && !pairs.empty());
  op.callBoxed(stack);
  for (c10::IValue& value : *stack) {
    if (&value < stack->data() + first) continue;
    value = changed(value, [&](const at::Tensor& x) { return to_gpu(x, pairs, on_gpu); });
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

// A tensor over a storage of the GPU.
at::Tensor& set_part(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  c10::TensorImpl* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(source));
  tensor->set_storage_offset(offset);
  if (stride.empty()) tensor->set_sizes_contiguous(size);
  else tensor->set_sizes_and_strides(size, stride);
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  const int64_t size = source.nbytes() / self.itemsize();
  return set_part(self, std::move(source), 0, {size}, {});
}

// Operators that torch has for all devices, and that look for a kernel of the device inside.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  for (const char* name : {"copy_", "fill_.Scalar", "fill_.Tensor", "_local_scalar_dense"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Storage_storage_offset", &set_part);
}

class Runner : public torch::inductor::AOTIModelContainerRunner {
 public:
  using AOTIModelContainerRunner::AOTIModelContainerRunner;
  Runner(const std::string& path, size_t models, const std::string& device, const std::string& folder, bool single)
      : AOTIModelContainerRunner(path, models, device, folder, single) {}
};

torch::inductor::RegisterAOTIModelRunner runner(
    "cuda", [](const std::string& path, size_t models, const std::string& device, const std::string& folder, bool single) {
      return std::unique_ptr<torch::inductor::AOTIModelContainerRunner>(new Runner(path, models, device, folder, single));
    });

char nothing;

at::Tensor& tensor_of(void* handle) { return *static_cast<at::Tensor*>(handle); }

}  // namespace

extern "C" {

const char* cudaGetErrorString(cudaError_t) { return "no error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = nullptr;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

// Products that generated code leaves to torch: those of linear layers.
int32_t aoti_torch_cuda_addmm_out(void* out, void* self, void* a, void* b, double beta, double alpha) {
  at::addmm_out(tensor_of(out), tensor_of(self), tensor_of(a), tensor_of(b), beta, alpha);
  return 0;
}
int32_t aoti_torch_cuda_mm_out(void* out, void* a, void* b) {
  at::mm_out(tensor_of(out), tensor_of(a), tensor_of(b));
  return 0;
}

int32_t aoti_torch_create_cuda_guard(int32_t, void** guard) {
  *guard = &nothing;
  return 0;
}
int32_t aoti_torch_delete_cuda_guard(void*) { return 0; }
int32_t aoti_torch_cuda_guard_set_index(void*, int32_t) { return 0; }
int32_t aoti_torch_create_cuda_stream_guard(void*, int32_t, void** guard) {
  *guard = &nothing;
  return 0;
}
int32_t aoti_torch_delete_cuda_stream_guard(void*) { return 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
