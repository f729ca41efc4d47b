// Runs an exported language model over the bytes of a file: no Python.
//
//   TORCH=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -O2 prefill.cpp -I$TORCH/include -I$TORCH/include/torch/csrc/api/include \
//       -L$TORCH/lib -Wl,-rpath,$TORCH/lib -ltorch -ltorch_cpu -lc10 -o prefill
//   ./prefill model.pt2 text.txt
//
// prefill.py beside this file exports the model, runs these lines and compares what comes out.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>

int main(int count, char** arguments) {
  if (count != 3) return std::cerr << "usage: prefill MODEL.pt2 TEXT\n", 2;
  const std::string package = arguments[1];

  // Attention is an operator of the library beside the package, which must be loaded first.
  if (!dlopen((package + ".so").c_str(), RTLD_NOW | RTLD_GLOBAL)) return std::cerr << dlerror() << "\n", 1;

  // One token a byte, (1, tokens).
  std::ifstream file(arguments[2], std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  if (text.size() < 2) return std::cerr << arguments[2] << " has no text\n", 1;
  const int64_t tokens = text.size();
  auto ids = at::empty({1, tokens}, at::kLong);
  for (int64_t i = 0; i < tokens; ++i) ids.data_ptr<int64_t>()[i] = static_cast<unsigned char>(text[i]);

  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(package);
  const auto start = std::chrono::steady_clock::now();
  const auto logits = model.run({ids})[0];  // (1, tokens, vocabulary)
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;

  const auto [scores, next] = logits.select(1, -1).squeeze(0).topk(3);
  std::cout << "prefill of " << tokens << " tokens in " << seconds.count() << " s\nnext:";
  for (int64_t i = 0; i < 3; ++i) std::cout << " " << next[i].item<int64_t>() << " (" << scores[i].item<float>() << ")";
  std::cout << "\n";
}
