#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_plan.h"
#include "isa.h"

namespace kvloom {

namespace {

constexpr float kLog2E = 1.44269504089f;

// One task's arguments for the kernel, and their memory.
struct Rows {
  int num_rows;
  char* queries;
  int32_t *first, *last, *position;
  float *slope, *peak, *total, *sum;
  char* kernel_scratch;

  static std::size_t bytes(int rows, int v_width) {
    const std::size_t tiles = static_cast<std::size_t>(rows + kTileRows - 1) / kTileRows * kTileRows;
    return tiles * kTileRowBytes + static_cast<std::size_t>(rows) * (6 + v_width + 1024) * 4 + 4096 +
           kKernelScratchBytes;
  }
  Rows(char* memory, int rows, int v_width) : num_rows(rows) {
    const std::size_t tiles = static_cast<std::size_t>(rows + kTileRows - 1) / kTileRows * kTileRows;
    queries = memory;
    char* at = memory + tiles * kTileRowBytes;
    auto take = [&](std::size_t count) {
      char* p = at;
      at += (count * 4 + 63) / 64 * 64;
      return p;
    };
    first = reinterpret_cast<int32_t*>(take(rows));
    last = reinterpret_cast<int32_t*>(take(rows));
    position = reinterpret_cast<int32_t*>(take(rows));
    slope = reinterpret_cast<float*>(take(rows));
    peak = reinterpret_cast<float*>(take(rows));
    total = reinterpret_cast<float*>(take(rows));
    sum = reinterpret_cast<float*>(take(static_cast<std::size_t>(rows) * v_width));
    kernel_scratch = take(0);
  }
};

AttendArgs prepare(const Kernels& kernel, const AttentionCall& call, const Task& task, Rows& rows) {
  const LayerShape& shape = call.shape;
  const int heads = shape.num_heads / shape.num_kv_heads, table_row = call.batch.seq_rows[task.seq];
  const int lane = shape.lane_offset + task.kv_head;
  const int token0 = call.batch.cu_seqlens[task.seq];
  const int n = call.batch.count(task.seq);
  const int visible = lane_begin(call.lanes, table_row, lane), end = lane_end(call.lanes, call.batch, task.seq, lane);
  const float scale = call.scale * (call.softcap > 0 ? 1.0f : kLog2E);
  const std::size_t size = call.q_element == Element::kFloat ? 4 : 2;
  const int32_t* slot_position = nullptr;
  if (call.slopes && call.slot_positions && call.slot_positions[table_row].first)
    slot_position = call.slot_positions[table_row].first + lane * call.slot_positions[table_row].lane_stride;
  int r = 0;
  for (int i = task.q0; i < task.q1; ++i)
    for (int h = 0; h < heads; ++h, ++r) {
      const std::size_t at = static_cast<std::size_t>(token0 + i) * call.q_stride +
                             static_cast<std::size_t>(task.kv_head * heads + h) * shape.k_width;
      char* const query = rows.queries + static_cast<std::size_t>(r) * kTileRowBytes;
      kernel.scaled(call.q_element, static_cast<const char*>(call.q) + at * size, scale, call.compute, query, shape.k_width);
      const std::size_t bytes = call.compute == Element::kFloat ? 4 : 2;
      std::memset(query + shape.k_width * bytes, 0, (block_width(shape.k_width) - shape.k_width) * bytes);
      const int last = end - n + i + 1;
      rows.last[r] = last;
      rows.first[r] = shape.window ? std::max(visible, last - shape.window) : visible;
      if (call.chunk) rows.first[r] = std::max(rows.first[r], (last - 1) / call.chunk * call.chunk);
      rows.position[r] = slot_position ? slot_position[last - 1] : last - 1;
      if (call.slopes) rows.slope[r] = call.slopes[task.kv_head * heads + h];
    }
  AttendArgs args = {};
  args.lane = lane_of(call.lanes, shape, table_row, task.kv_head);
  Stores stores(args.lane);
  if (args.lane.num_segments && stores.run_end(task.begin) >= task.end) {  // the kernel need not look for stores
    args.lane.store = stores.of(task.begin);
    args.lane.num_segments = 0;
  }
  args.compute = call.compute;
  args.queries = rows.queries;
  args.num_rows = rows.num_rows;
  args.first = rows.first;
  args.last = rows.last;
  args.slot_begin = task.begin;
  args.slot_end = task.end;
  args.lane_end = end;
  args.softcap = call.softcap;
  args.slope = call.slopes ? rows.slope : nullptr;
  args.position = rows.position;
  args.slot_position = slot_position;
  args.bias = call.bias ? call.bias + table_row * call.bias_seq_stride + lane * call.bias_lane_stride : nullptr;
  args.peak = rows.peak;
  args.total = rows.total;
  args.sum = rows.sum;
  return args;
}

// Tasks that a thread claims at a time: many, because neighbours are often adjacent in memory, and few towards the end,
// so that all threads end together.
struct Claims {
  int count, many, few, num_many;

  Claims(int count, int num_threads)
      : count(count), many(std::max(1, count / (num_threads * 16))), few(std::max(1, many / 8)),
        num_many(count / 4 * 3 / many) {}

  // The first task of a claim; `count` where none is left.
  int begin(int claim) const {
    return claim < num_many ? claim * many : std::min(count, num_many * many + (claim - num_many) * few);
  }
};

// Divide one row by its denominator and write it to every output of the call.
void finish_row(const Kernels& kernel, const AttentionCall& call, int token, int head, float peak, float total,
                float* sum) {
  const int width = call.shape.v_width;
  if (call.sinks) {
    const float sink = call.sinks[head] * kLog2E;
    if (sink > peak) {
      const float shrink = total > 0 ? std::exp2(peak - sink) : 0.0f;
      for (int d = 0; d < width; ++d) sum[d] *= shrink;
      total = total * shrink + 1.0f;
      peak = sink;
    } else {
      total += std::exp2(sink - peak);
    }
  }
  const float inverse = total > 0 ? 1.0f / total : 0.0f;
  if (call.out_tiles) {
    write_tiles(kernel, *call.out_tiles, token, head * width, sum, inverse, width);
  } else {
    const std::size_t size = call.out_element == Element::kFloat ? 4 : 2;
    const std::size_t at = static_cast<std::size_t>(token) * call.out_stride + static_cast<std::size_t>(head) * width;
    kernel.scaled(Element::kFloat, sum, inverse, call.out_element, static_cast<char*>(call.out) + at * size, width);
  }
  if (call.lse)
    call.lse[static_cast<std::size_t>(token) * call.shape.num_heads + head] =
        total > 0 ? (peak + std::log2(total)) / kLog2E : -INFINITY;
}

// Join the parts whose results begin at `partial`, for all rows of tokens [token0, ...) of one KV head, and finish them.
void join_parts(const Kernels& kernel, const AttentionCall& call, const float* partial, int num_parts, int num_rows,
                int token0, int kv_head) {
  const int heads = call.shape.num_heads / call.shape.num_kv_heads, width = block_width(call.shape.v_width);
  alignas(64) float sum[1024];
  for (int r = 0; r < num_rows; ++r) {
    float peak, total;
    kernel.join(partial + r, partial + num_rows + r, partial + part_sums(num_rows) + static_cast<std::ptrdiff_t>(r) * width,
                part_floats(num_rows, width), num_parts, width, &peak, &total, sum);
    finish_row(kernel, call, token0 + r / heads, kv_head * heads + r % heads, peak, total, sum);
  }
}

}  // namespace

Lane lane_of(const LaneTable& table, const LayerShape& shape, int seq_row, int kv_head) {
  const int index = shape.lane_offset + kv_head;
  Lane lane = {};
  lane.columns = table.table + seq_row * table.seq_stride + index * table.lane_stride;
  lane.arena = table.arena;
  lane.block_size = table.block_size;
  lane.block_inverse = table.block_inverse;
  lane.k_width = block_width(shape.k_width);
  lane.v_width = block_width(shape.v_width);
  lane.store = table.store;
  if (table.segment_start) {
    const int32_t* start = table.segment_start + static_cast<std::ptrdiff_t>(seq_row) * table.num_lanes + index;
    lane.num_segments = start[1] - start[0];
    lane.segment_store = table.segment_store + start[0];
    lane.segment_end = table.segment_end + start[0];
  }
  return lane;
}

void write_tiles(const Kernels& kernel, const Tiles& tiles, int t, int offset, const float* x, float by, int n) {
  const int bytes = activation_bytes(tiles.product);
  while (n > 0) {
    const int slice = offset / tiles.slice_elements, within = offset % tiles.slice_elements;
    const int count = std::min(n, tiles.slice_elements - within);
    kernel.scaled(Element::kFloat, x, by, bytes == 4 ? Element::kFloat : Element::kBf16,
                  tiles.row(t, slice) + within * bytes, static_cast<std::size_t>(count));
    x += count;
    offset += count;
    n -= count;
  }
}

void attention(Team& team, const AttentionCall& call, Workspace& workspace) {
  const Kernels& kernel = kernels();
  const LayerShape& shape = call.shape;
  const int heads = shape.num_heads / shape.num_kv_heads, width = block_width(shape.v_width);
  const AttentionPlan plan = attention_plan(call, team.size());
  const int count = static_cast<int>(plan.tasks.size());
  const bool grow = workspace.partial.size() < static_cast<std::size_t>(plan.partial_floats);
  if (plan.partial_floats) {
    team.barrier();  // all have read the size
    if (grow) {
      if (team.id() == 0) workspace.partial.resize(static_cast<std::size_t>(plan.partial_floats));
      team.barrier();
    }
  }
  const std::size_t row_bytes = Rows::bytes(std::max(kBlockRows, std::max(heads, kSplitRows)), width);
  char* memory = team.scratch(row_bytes + static_cast<std::size_t>(plan.own_floats) * 4 + 64);
  float* own = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(memory) + row_bytes + 63) & ~std::uintptr_t{63});
  // Whole contexts take up to a millisecond each, so no thread may claim several of the last ones. Runs of parts are short.
  const bool short_tasks = plan.own_floats || !plan.splits.empty();
  const Claims claims(count, short_tasks ? team.size() : count);
  int claim = team.next(), index = claims.begin(claim);
  while (index < count) {
    int following = index + 1;
    if (following == claims.begin(claim + 1)) following = claims.begin(claim = team.next());
    const Task& task = plan.tasks[static_cast<std::size_t>(index)];
    AttendArgs upcoming = {};
    if (following < count) {
      const Task& next = plan.tasks[static_cast<std::size_t>(following)];
      upcoming.lane = lane_of(call.lanes, shape, call.batch.seq_rows[next.seq], next.kv_head);
      upcoming.slot_begin = next.begin;
      upcoming.slot_end = next.end;
    }
    float* const partial = task.num_parts ? own : task.partial >= 0 ? workspace.partial.data() + task.partial : nullptr;
    const int num_rows = (task.q1 - task.q0) * heads, token0 = call.batch.cu_seqlens[task.seq];
    const int at_once = task.split ? tokens_at_once(heads) : task.q1 - task.q0;
    for (Task piece = task; piece.q0 < task.q1; piece.q0 = piece.q1) {
      piece.q1 = std::min(piece.q0 + at_once, task.q1);
      Rows rows(memory, (piece.q1 - piece.q0) * heads, width);
      AttendArgs args = prepare(kernel, call, piece, rows);
      if (following < count && piece.q1 == task.q1) args.upcoming = &upcoming;
      if (partial) {
        const int row0 = (piece.q0 - task.q0) * heads;
        args.peak = partial + row0;
        args.total = partial + num_rows + row0;
        args.sum = partial + part_sums(num_rows) + static_cast<std::ptrdiff_t>(row0) * width;
        args.part_slots = kContextPart;
        args.part_stride = part_floats(num_rows, width);
      }
      kernel.attend(args, rows.kernel_scratch);
      for (int r = 0; !partial && r < rows.num_rows; ++r)
        finish_row(kernel, call, token0 + piece.q0 + r / heads, task.kv_head * heads + r % heads, rows.peak[r],
                   rows.total[r], rows.sum + static_cast<std::size_t>(r) * width);
    }
    if (task.num_parts) join_parts(kernel, call, own, task.num_parts, num_rows, token0 + task.q0, task.kv_head);
    index = following;
  }
  if (plan.partial_floats == 0) return;
  team.barrier();
  for (int i = team.id(); i < static_cast<int>(plan.splits.size()); i += team.size()) {
    const Split& split = plan.splits[static_cast<std::size_t>(i)];
    join_parts(kernel, call, workspace.partial.data() + split.partial, split.num_parts,
               call.batch.count(split.seq) * heads, call.batch.cu_seqlens[split.seq], split.kv_head);
  }
}

void key_mass(Team& team, const AttentionCall& call, const float* lse, float* mass, std::ptrdiff_t num_slots) {
  const Kernels& kernel = kernels();
  const LayerShape& shape = call.shape;
  const int heads = shape.num_heads / shape.num_kv_heads, block = std::max(1, kBlockRows / heads);
  std::vector<Task> tasks;
  for (int b = 0; b < call.batch.num_seqs; ++b)
    for (int g = 0; g < shape.num_kv_heads; ++g) {
      const int row = call.batch.seq_rows[b], lane = shape.lane_offset + g;
      const int n = call.batch.count(b), end = lane_end(call.lanes, call.batch, b, lane);
      for (int s = lane_begin(call.lanes, row, lane); s < end;) {
        const int stop = std::min(end, (s / kContextPart + 1) * kContextPart);
        tasks.push_back({b, g, 0, n, s, stop, 0, -1});
        s = stop;
      }
    }
  char* memory = team.scratch(Rows::bytes(std::max(kBlockRows, heads), block_width(shape.v_width)) + kBlockRows * 16 * 4);
  std::vector<float> row_lse(static_cast<std::size_t>(std::max(kBlockRows, heads)));
  for (int i; (i = team.next()) < static_cast<int>(tasks.size());) {
    Task task = tasks[static_cast<std::size_t>(i)];
    const int n = task.q1, token0 = call.batch.cu_seqlens[task.seq];
    for (int q0 = 0; q0 < n; q0 += block) {  // one thread adds a column up, in order
      task.q0 = q0;
      task.q1 = std::min(n, q0 + block);
      Rows rows(memory, (task.q1 - task.q0) * heads, block_width(shape.v_width));
      MassArgs args = {prepare(kernel, call, task, rows), row_lse.data(), nullptr};
      if (rows.last[rows.num_rows - 1] <= task.begin) continue;
      for (int r = 0; r < rows.num_rows; ++r)
        row_lse[static_cast<std::size_t>(r)] = lse[static_cast<std::size_t>(token0 + task.q0 + r / heads) *
                                                       shape.num_heads + task.kv_head * heads + r % heads];
      args.mass = mass + (static_cast<std::ptrdiff_t>(task.seq) * shape.num_kv_heads + task.kv_head) * num_slots + task.begin;
      kernel.mass(args, rows.kernel_scratch);
    }
  }
}

namespace {

void clamp(float* x, int n, float most) {
  for (int i = 0; i < n; ++i) x[i] = std::clamp(x[i], -most, most);
}

// What multiplies the queries of token t.
float warmth(const AppendCall& call, int t) {
  const float periods = std::floor((static_cast<float>(call.positions[t]) + 1) / call.temperature.period);
  return 1 + call.temperature.scale * std::log1p(periods);
}

// Return x [width] as a block holds it: itself, or a copy in `padded` with zeros behind it.
const float* as_stored(const float* x, int width, float* padded) {
  if (block_width(width) == width) return x;
  if (x != padded) std::copy(x, x + width, padded);
  std::fill(padded + width, padded + block_width(width), 0.0f);
  return padded;
}

}  // namespace

void append(Team& team, const AppendCall& call) {
  const Kernels& kernel = kernels();
  const LayerShape& shape = call.shape;
  const int query_heads = call.q ? shape.num_heads : 0, per_token = query_heads + shape.num_kv_heads;
  const std::size_t size = call.element == Element::kFloat ? 4 : 2;
  int begin, end;
  team.share(call.batch.num_tokens * per_token, &begin, &end);
  int seq = 0;
  float own_head[1024], own_values[1024];  // as wide as a block's
  const bool wide = call.element == Element::kFloat;  // processed in place
  for (int item = begin; item < end; ++item) {
    const int t = item / per_token, j = item % per_token;
    while (call.batch.cu_seqlens[seq + 1] <= t) ++seq;
    const bool query = j < query_heads;
    const int h = query ? j : j - query_heads;
    char* at = static_cast<char*>(query ? call.q : call.k) +
               (static_cast<std::size_t>(t) * (query ? call.q_stride : call.k_stride) +
                static_cast<std::size_t>(h) * shape.k_width) * size;
    const Norm& norm = query ? call.q_norm : call.k_norm;
    float* const head = wide ? reinterpret_cast<float*>(at) : own_head;
    if (!wide) kernel.to_float(call.element, at, head, shape.k_width);
    if (call.clip > 0) clamp(head, shape.k_width, call.clip);
    if (norm && !call.norm_after_rope) normalise(kernel, norm, head, shape.k_width, head);
    if (call.cos_sin && call.rotary)
      kernel.rope(head, shape.k_width, call.cos_sin + static_cast<std::size_t>(t) * call.rotary, call.rotary);
    if (norm && call.norm_after_rope) normalise(kernel, norm, head, shape.k_width, head);
    const bool tempered = query && call.temperature.period > 0;
    if (tempered) kernel.scaled(Element::kFloat, head, warmth(call, t), Element::kFloat, head, shape.k_width);
    if (!wide && (call.clip > 0 || norm || tempered || (call.cos_sin && call.rotary)))
      kernel.from_float(call.element, head, at, shape.k_width);
    if (query) continue;
    const int row = call.batch.seq_rows[seq];
    const int slot = lane_end(call.lanes, call.batch, seq, shape.lane_offset + h) - call.batch.cu_seqlens[seq + 1] + t;
    const char* v = static_cast<const char*>(call.v) +
                    (static_cast<std::size_t>(t) * call.v_stride + static_cast<std::size_t>(h) * shape.v_width) * size;
    const bool as_given = wide && call.clip == 0;
    const float* const value = as_given ? reinterpret_cast<const float*>(v) : own_values;
    if (!as_given) kernel.to_float(call.element, v, own_values, shape.v_width);
    if (call.clip > 0) clamp(own_values, shape.v_width, call.clip);
    kernel.write_slot(lane_of(call.lanes, shape, row, h), slot, as_stored(head, shape.k_width, own_head),
                      as_stored(value, shape.v_width, own_values));
  }
}

}  // namespace kvloom
