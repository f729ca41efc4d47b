// The widths of this machine's vectors, and the sizes of tiles of queries and blocks of keys.
#pragma once
#include <cstdint>

namespace native {

#define NATIVE_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// Vectors of queries per tile.
constexpr int tile_vectors = 4;

template <class T>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));

constexpr int block_keys = 64;  // most keys of a block: scores and weights of a tile stay in the L1 cache
template <class T>
constexpr int tile_queries = tile_vectors * lanes<T>;

}  // namespace native
