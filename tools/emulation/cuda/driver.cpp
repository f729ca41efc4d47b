// A pretended libcuda: modules and launches are passed to functions of this process.
#include <cuda.h>

#include <cstdint>

namespace {

// The number of a module, from the file or the bytes of its machine code; 0 where it is refused.
using Load = uint64_t (*)(const char* path, const void* bytes);
// Whether a kernel is launched: 0 where it is refused.
using Launch = int (*)(uint64_t module, const char* name, const uint32_t* grid, uint32_t threads, uint32_t shared, void** arguments);

Load load = nullptr;
Launch launch = nullptr;

struct Function {
  uint64_t module;
  const char* name;
};

CUresult loaded(CUmodule* module, const char* path, const void* bytes) {
  const uint64_t number = load ? load(path, bytes) : 0;
  *module = reinterpret_cast<CUmodule>(number);
  return number ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

}  // namespace

extern "C" {

void pretend(Load load_module, Launch launch_kernel) { load = load_module, launch = launch_kernel; }

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_SUCCESS ? "no error" : "the pretended driver refuses; its reason is on stderr";
  return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule* module, const char* path) { return loaded(module, path, nullptr); }
CUresult cuModuleLoadData(CUmodule* module, const void* bytes) { return loaded(module, nullptr, bytes); }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

// The name is copied: that of the caller is a temporary.
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  char* copy = new char[__builtin_strlen(name) + 1];
  __builtin_strcpy(copy, name);
  *function = reinterpret_cast<CUfunction>(new Function{reinterpret_cast<uint64_t>(module), copy});
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                        CUstream, void** arguments, void**) {
  const auto* kernel = reinterpret_cast<const Function*>(function);
  const uint32_t grid[3] = {x, y, z};
  return launch && launch(kernel->module, kernel->name, grid, threads, shared, arguments) ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_FAILED;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
}
