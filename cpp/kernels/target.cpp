// Compiled once per instruction set; exports the set's table.
#include "attend.h"
#include "encode.h"
#include "int4_fit.h"
#include "linear.h"
#include "rows.h"
#include "slot.h"

namespace KVLOOM_ISA {
extern const kvloom::Kernels table;
const kvloom::Kernels table = {
    KVLOOM_NAME, linear, group_sums, int4_fit, pack_row, convert_to_float, convert_from_float,
    convert_scaled, rms_norm, layer_norm, add, gate, rope,
    write_slot, encode_block, attend, join, mass, argmax, read_probe, flop_probe,
};
}  // namespace KVLOOM_ISA
