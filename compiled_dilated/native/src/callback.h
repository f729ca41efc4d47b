// A function of the caller, or none, called by pointer, so that its caller is compiled once.
#pragma once

namespace native {

// The function must outlive the callback.
template <class... Arguments>
class Callback {
 public:
  Callback() = default;
  template <class Body>
  Callback(const Body& body)  // NOLINT: a function is such a callback
      : body_(&body), run_([](const void* of, Arguments... arguments) { (*static_cast<const Body*>(of))(arguments...); }) {}
  explicit operator bool() const { return run_ != nullptr; }
  void operator()(Arguments... arguments) const { run_(body_, arguments...); }

 private:
  const void* body_ = nullptr;
  void (*run_)(const void*, Arguments...) = nullptr;
};

}  // namespace native
