;; y (T, R) = x (T, C) times the transpose of w (R, C): all float32, row by row.
;;
;; R and C are multiples of 4, so there are no remainders: the page pads its matrices with zeros. Addresses and steps
;; (from one row to the next) are in bytes. Four rows of w stay in the processor's cache for all rows of x.
(module
  (import "page" "memory" (memory 1))
  (func (export "multiply")
    (param $x i32) (param $w i32) (param $y i32)
    (param $T i32) (param $R i32) (param $C i32)
    (param $x_step i32) (param $w_step i32) (param $y_step i32)
    (local $w1 i32) (local $w2 i32) (local $w3 i32) (local $row i32) (local $out i32) (local $t i32) (local $c i32)
    (local $bytes i32) (local $values v128)
    (local $sum0 v128) (local $sum1 v128) (local $sum2 v128) (local $sum3 v128)

    local.get $C
    i32.const 2
    i32.shl
    local.set $bytes
    loop $rows ;; of w, four at a time
      local.get $w
      local.get $w_step
      i32.add
      local.tee $w1
      local.get $w_step
      i32.add
      local.tee $w2
      local.get $w_step
      i32.add
      local.set $w3
      local.get $x
      local.set $row
      local.get $y
      local.set $out
      local.get $T
      local.set $t
      loop $tokens ;; the rows of x
        i32.const 0
        i32x4.splat
        local.tee $sum0
        local.tee $sum1
        local.tee $sum2
        local.set $sum3
        i32.const 0
        local.set $c
        loop $channels ;; four at a time, the lanes of a vector
          local.get $row
          local.get $c
          i32.add
          v128.load
          local.set $values
          local.get $w
          local.get $c
          i32.add
          v128.load
          local.get $values
          f32x4.mul
          local.get $sum0
          f32x4.add
          local.set $sum0
          local.get $w1
          local.get $c
          i32.add
          v128.load
          local.get $values
          f32x4.mul
          local.get $sum1
          f32x4.add
          local.set $sum1
          local.get $w2
          local.get $c
          i32.add
          v128.load
          local.get $values
          f32x4.mul
          local.get $sum2
          f32x4.add
          local.set $sum2
          local.get $w3
          local.get $c
          i32.add
          v128.load
          local.get $values
          f32x4.mul
          local.get $sum3
          f32x4.add
          local.set $sum3

          local.get $c
          i32.const 16
          i32.add
          local.tee $c
          local.get $bytes
          i32.lt_u
          br_if $channels
        end

        ;; the sum of each vector's lanes, by two transpositions
        local.get $out
        local.get $sum0
        local.get $sum1
        i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23
        local.get $sum0
        local.get $sum1
        i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31
        f32x4.add
        local.tee $sum0
        local.get $sum2
        local.get $sum3
        i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23
        local.get $sum2
        local.get $sum3
        i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31
        f32x4.add
        local.tee $sum2
        i8x16.shuffle 0 1 2 3 4 5 6 7 16 17 18 19 20 21 22 23
        local.get $sum0
        local.get $sum2
        i8x16.shuffle 8 9 10 11 12 13 14 15 24 25 26 27 28 29 30 31
        f32x4.add
        v128.store

        local.get $row
        local.get $x_step
        i32.add
        local.set $row
        local.get $out
        local.get $y_step
        i32.add
        local.set $out
        local.get $t
        i32.const 1
        i32.sub
        local.tee $t
        br_if $tokens
      end
      local.get $w3
      local.get $w_step
      i32.add
      local.set $w
      local.get $y
      i32.const 16
      i32.add
      local.set $y
      local.get $R
      i32.const 4
      i32.sub
      local.tee $R
      br_if $rows
    end
  )
)
