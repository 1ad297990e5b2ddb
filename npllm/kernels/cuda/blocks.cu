// Weights in the block formats of GGUF, as they lie in the file: 32 or 256 adjacent entries of a
// row in a block.  The formulas are those of npllm/quantized/blocks_of_32.py and k_blocks.py, with
// the same roundings, so that an entry has the same bits.
//
// A lane takes a unit, 32 entries of a block whose bits stand in the same bytes.  A format has
//     BLOCK, BYTES             entries and bytes of a block
//     load(blocks, block, u)   fetch unit u of a block
//     four(half, part, w)      widen the four entries from 16 * half + 4 * part on, part < 4
// and an Order: unit_of(i) and entry_of(i), the unit and the place in it of entry i of a row, and
// back, index(unit, e).  Four entries from a multiple of 4 on lie side by side in both.
//
// A block whose bytes are no multiple of 4 may begin in the middle of a word: Bytes reads the
// words around it.  Its last word may go 2 bytes beyond the block, so the matrix must be whole
// words; it begins at a multiple of 16 bytes.

// The 4 * N - 2 bytes from p on, which is a multiple of 2, or 4 * N where it is one of 4.
template <int N>
struct Bytes {
    unsigned word[N];
    bool odd;  // p is no multiple of 4

    __device__ void load(const unsigned char* matrix, i64 at) {
        odd = at & 2;
        const unsigned* from = (const unsigned*)(matrix + (at & ~3));
#pragma unroll
        for (int k = 0; k < N; ++k) word[k] = from[k];
    }

    // 4 bytes from byte t on, a multiple of 2.
    __device__ unsigned at(int t) const {
        int k = t / 4;
        if (t % 4 == 0) return __byte_perm(word[k], word[k + 1], odd ? 0x5432 : 0x3210);
        return __byte_perm(word[k], word[k + 1], odd ? 0x7654 : 0x5432);
    }
};

// n bits of a word from bit `first` on.
__device__ inline unsigned bits_of(unsigned word, int first, int n) {
    return (word >> first) & ((1u << n) - 1);
}

// q - minus, exactly, for integers 0 <= q, minus < 2**22: q is put behind the bits of 2**23.
__device__ inline float difference(unsigned q, float minus) {
    return __uint_as_float(0x4b000000u | q) - (8388608.0f + minus);
}

// A nibble and the bit above it, which begin at these bits of two words.
__device__ inline unsigned five_bits(unsigned nibbles, unsigned fifth, int at, int fifth_at) {
    return bits_of(nibbles, at, 4) | (bits_of(fifth, fifth_at, 1) << 4);
}

// N words from a place that is a multiple of 4 bytes.
template <int N>
__device__ void load_words(unsigned (&word)[N], const unsigned char* from) {
#pragma unroll
    for (int k = 0; k < N; ++k) word[k] = ((const unsigned*)from)[k];
}

__device__ inline float half_of(unsigned word) { return widen(f16{(unsigned short)word}); }

// Byte j of a word, as a signed integer.
__device__ inline float signed_byte(unsigned word, int j) {
    return difference(bits_of(word, 8 * j, 8) ^ 128u, 128.0f);
}

// Blocks of 32: a unit is a block.
struct InOrder {
    static __device__ unsigned unit_of(unsigned i) { return i / 32; }
    static __device__ unsigned entry_of(unsigned i) { return i % 32; }
    static __device__ unsigned index(unsigned unit, unsigned e) { return unit * 32 + e; }
};

// Q4_K, Q5_K: 16 bytes hold low nibbles of 16 entries, and high ones of those 32 further on.
struct InHalves {
    static __device__ unsigned unit_of(unsigned i) { return i / 64 * 2 + i % 32 / 16; }
    static __device__ unsigned entry_of(unsigned i) { return i % 64 / 32 * 16 + i % 16; }
    static __device__ unsigned index(unsigned unit, unsigned e) {
        return unit / 2 * 64 + e / 16 * 32 + unit % 2 * 16 + e % 16;
    }
};

// Q6_K: 8 bytes of high bits belong to 4 times 8 entries, 32 apart.
struct InQuarters {
    static __device__ unsigned unit_of(unsigned i) { return i / 128 * 4 + i % 32 / 8; }
    static __device__ unsigned entry_of(unsigned i) { return i % 128 / 32 * 8 + i % 8; }
    static __device__ unsigned index(unsigned unit, unsigned e) {
        return unit / 4 * 128 + e / 8 * 32 + unit % 4 * 8 + e % 8;
    }
};

struct Q4_0 {  // w[i] = d * (q[i] - 8)
    typedef InOrder Order;
    static constexpr unsigned BLOCK = 32, BYTES = 18;
    Bytes<5> bytes;

    __device__ void load(const unsigned char* blocks, i64 block, unsigned) {
        bytes.load(blocks, block * BYTES);
    }
    __device__ void four(int half, int part, float* w) const {
        float d = half_of(bytes.at(0));
        unsigned q = bytes.at(2 + part * 4) >> half * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = d * difference(bits_of(q, 8 * j, 4), 8.0f);
    }
};

struct Q4_1 {  // w[i] = d * q[i] + m
    typedef InOrder Order;
    static constexpr unsigned BLOCK = 32, BYTES = 20;
    unsigned word[5];

    __device__ void load(const unsigned char* blocks, i64 block, unsigned) {
        load_words(word, blocks + block * BYTES);
    }
    __device__ void four(int half, int part, float* w) const {
        float d = half_of(word[0]), m = half_of(word[0] >> 16);
        unsigned q = word[1 + part] >> half * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = fmaf(d, difference(bits_of(q, 8 * j, 4), 0.0f), m);
    }
};

struct Q5_0 {  // w[i] = d * (q[i] - 16)
    typedef InOrder Order;
    static constexpr unsigned BLOCK = 32, BYTES = 22;
    Bytes<6> bytes;

    __device__ void load(const unsigned char* blocks, i64 block, unsigned) {
        bytes.load(blocks, block * BYTES);
    }
    __device__ void four(int half, int part, float* w) const {
        float d = half_of(bytes.at(0));
        unsigned q = bytes.at(6 + part * 4) >> half * 4, fifth = bytes.at(2) >> (half * 4 + part) * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = d * difference(five_bits(q, fifth, 8 * j, j), 16.0f);
    }
};

struct Q5_1 {  // w[i] = d * q[i] + m
    typedef InOrder Order;
    static constexpr unsigned BLOCK = 32, BYTES = 24;
    unsigned word[6];

    __device__ void load(const unsigned char* blocks, i64 block, unsigned) {
        load_words(word, blocks + block * BYTES);
    }
    __device__ void four(int half, int part, float* w) const {
        float d = half_of(word[0]), m = half_of(word[0] >> 16);
        unsigned q = word[2 + part] >> half * 4, fifth = word[1] >> (half * 4 + part) * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            w[j] = fmaf(d, difference(five_bits(q, fifth, 8 * j, j), 0.0f), m);
    }
};

struct Q8_0 {  // w[i] = d * q[i]
    typedef InOrder Order;
    static constexpr unsigned BLOCK = 32, BYTES = 34;
    Bytes<9> bytes;

    __device__ void load(const unsigned char* blocks, i64 block, unsigned) {
        bytes.load(blocks, block * BYTES);
    }
    __device__ void four(int half, int part, float* w) const {
        float d = half_of(bytes.at(0));
        unsigned q = half ? bytes.at(18 + part * 4) : bytes.at(2 + part * 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = d * signed_byte(q, j);
    }
};

// Scale and minimum s of a block, 6 bits each: `_scales_and_minimums` of k_blocks.py.
// a: the three words that hold all eight of both.
__device__ inline void scale_and_minimum(const unsigned* a, unsigned s, float d, float d_min,
                                         float& scale, float& minimum) {
    unsigned byte = s % 4 * 8, sc = bits_of(a[0], byte, 8), m = bits_of(a[1], byte, 8),
             both = bits_of(a[2], byte, 8);
    unsigned high_sc = (both & 15) | (sc >> 6 << 4), high_m = (both >> 4) | (m >> 6 << 4);
    scale = d * difference(s < 4 ? sc & 63 : high_sc, 0.0f);
    minimum = d_min * difference(s < 4 ? m & 63 : high_m, 0.0f);
}

struct Q4_K {  // w[i] = d * sc[i / 32] * q[i] - d_min * m[i / 32]
    typedef InHalves Order;
    static constexpr unsigned BLOCK = 256, BYTES = 144;
    Words<i8> head, nibbles;
    unsigned sub_block;  // of the low nibbles; the high ones are of the next

    __device__ void load(const unsigned char* blocks, i64 block, unsigned unit) {
        const unsigned char* at = blocks + block * BYTES;
        head = *(const Words<i8>*)at;
        nibbles = *(const Words<i8>*)(at + 16 + unit * 16);
        sub_block = unit / 2 * 2;
    }
    __device__ void four(int half, int part, float* w) const {
        float d = half_of(head.word[0]), d_min = half_of(head.word[0] >> 16), scale, minimum;
        scale_and_minimum(head.word + 1, sub_block + half, d, d_min, scale, minimum);
        unsigned q = nibbles.word[part] >> half * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            w[j] = fmaf(scale, difference(bits_of(q, 8 * j, 4), 0.0f), -minimum);
    }
};

struct Q5_K {  // w[i] = d * sc[i / 32] * q[i] - d_min * m[i / 32]
    typedef InHalves Order;
    static constexpr unsigned BLOCK = 256, BYTES = 176;
    Words<i8> head, fifth, nibbles;
    unsigned sub_block;  // of the low nibbles; the high ones are of the next

    __device__ void load(const unsigned char* blocks, i64 block, unsigned unit) {
        const unsigned char* at = blocks + block * BYTES;
        head = *(const Words<i8>*)at;
        fifth = *(const Words<i8>*)(at + 16 + unit % 2 * 16);
        nibbles = *(const Words<i8>*)(at + 48 + unit * 16);
        sub_block = unit / 2 * 2;
    }
    __device__ void four(int half, int part, float* w) const {
        float d = half_of(head.word[0]), d_min = half_of(head.word[0] >> 16), scale, minimum;
        unsigned s = sub_block + half;
        scale_and_minimum(head.word + 1, s, d, d_min, scale, minimum);
        unsigned q = nibbles.word[part] >> half * 4, bits = fifth.word[part] >> s;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            w[j] = fmaf(scale, difference(five_bits(q, bits, 8 * j, 8 * j), 0.0f), -minimum);
    }
};

struct Q6_K {  // w[i] = d * sc[i / 16] * (q[i] - 32)
    typedef InQuarters Order;
    static constexpr unsigned BLOCK = 256, BYTES = 210;
    Bytes<3> low[2], high;  // 4 bits of entries 8 (2 s + n) ...: s = 0 in the low nibbles; 2 bits
    unsigned sc, d;         // byte s of sc: of entries 8 s ...

    __device__ void load(const unsigned char* blocks, i64 block, unsigned unit) {
        i64 at = block * BYTES;
        unsigned c = unit / 4, l = unit % 4 * 8;
        low[0].load(blocks, at + 64 * c + l);
        low[1].load(blocks, at + 64 * c + 32 + l);
        high.load(blocks, at + 128 + 32 * c + l);
        sc = 0;
#pragma unroll
        for (int s = 0; s < 4; ++s)
            sc |= (unsigned)blocks[at + 192 + 8 * c + 2 * s + l / 16] << 8 * s;
        d = *(const unsigned short*)(blocks + at + 208);
    }
    __device__ void four(int half, int part, float* w) const {
        int s = 2 * half + part / 2, t = part % 2 * 4;
        float scale = half_of(d) * signed_byte(sc, s);
        unsigned nibbles = low[part / 2].at(t) >> half * 4, upper = high.at(t) >> 2 * s;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            unsigned q = bits_of(nibbles, 8 * j, 4) | (bits_of(upper, 8 * j, 2) << 4);
            w[j] = scale * difference(q, 32.0f);
        }
    }
};

// Unit `unit` of a row that begins with block `first`.
template <typename Format>
__device__ Format unit_of_row(const unsigned char* blocks, i64 first, unsigned unit) {
    constexpr unsigned N = Format::BLOCK / 32;
    Format loaded;
    loaded.load(blocks, first + unit / N, unit % N);
    return loaded;
}
