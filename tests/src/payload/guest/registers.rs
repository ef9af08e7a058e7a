//! Work that lives in registers: every general one but the stack pointer, every vector register,
//! the stack of the old floating-point unit, and both control words.
//!
//! Whatever of them a stop of the machine loses or mixes up is in the sum. Roundings go up, so a
//! control word that is lost changes the sums of floating-point numbers as well.

use core::arch::global_asm;
use core::mem::MaybeUninit;

use super::{load, store};

/// Words that hold all registers: 14 general ones, 16 of two words, 6 of up to two, control words.
const WORDS: u64 = 64;

global_asm!(
    r#"
    .section .rodata
    .balign 16
upward_vector:
    .long 0x5f80
upward_old:
    .word 0x0b7f
    .balign 16
thirds:
    .double 0.3333333333333333, 0.1428571428571428

    .section .text
    // Rounds in rdi, at least one; what to begin with in rsi; rdx says where they go in the end.
    .globl live_in_registers
live_in_registers:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rdx
    mov rcx, rdi
    ldmxcsr dword ptr [upward_vector]
    fninit
    // Six numbers; the last of them is added to the others in turn.
    fld1
    fldpi
    fldl2e
    fldln2
    fldlg2
    fldl2t
    fldcw word ptr [upward_old]
    .set turn, 0
    .irp register, rax, rbx, rdx, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rbp
    .set turn, turn + 4
    mov \register, rsi
    rol \register, turn
    .endr
    movq xmm0, rax
    movq xmm1, rbx
    movq xmm2, rdx
    movq xmm3, rdi
    movq xmm4, r8
    movq xmm5, r9
    movq xmm6, r10
    movq xmm7, r11
    movq xmm8, r12
    movq xmm9, r13
    movq xmm10, r14
    movq xmm11, r15
    .irp register, xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11
    punpcklqdq \register, \register
    .endr
    xorpd xmm12, xmm12
    movapd xmm13, xmmword ptr [thirds]
    xorpd xmm14, xmm14
    movapd xmm15, xmm13
    mulpd xmm15, xmm13
2:
    add rax, rbx
    xor rbx, rdx
    add rdx, rsi
    rol rsi, 9
    add rsi, rdi
    xor rdi, r8
    add r8, r9
    rol r9, 11
    add r9, r10
    xor r10, r11
    add r11, r12
    rol r12, 13
    add r12, r13
    xor r13, r14
    add r14, r15
    rol r15, 17
    add r15, rbp
    xor rbp, rax
    rol rbp, 3
    paddq xmm0, xmm1
    pxor xmm1, xmm2
    paddq xmm2, xmm3
    pxor xmm3, xmm4
    paddq xmm4, xmm5
    pxor xmm5, xmm6
    paddq xmm6, xmm7
    pxor xmm7, xmm8
    paddq xmm8, xmm9
    pxor xmm9, xmm10
    paddq xmm10, xmm11
    pxor xmm11, xmm0
    addpd xmm12, xmm13
    addpd xmm14, xmm15
    fadd st(0), st(5)
    fxch st(1)
    fxch st(2)
    fxch st(3)
    fxch st(4)
    dec rcx
    jnz 2b
    mov rcx, [rsp]
    .set at, 0
    .irp register, rax, rbx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15
    mov [rcx + at], \register
    .set at, at + 8
    .endr
    .irp number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movdqu [rcx + at], xmm\number
    .set at, at + 16
    .endr
    .rept 6
    fstp tbyte ptr [rcx + at]
    .set at, at + 16
    .endr
    // Without the notes of what was rounded, which not every emulator keeps.
    stmxcsr dword ptr [rcx + at]
    and dword ptr [rcx + at], -64
    fnstcw word ptr [rcx + at + 4]
    fninit
    push 0x1f80
    ldmxcsr dword ptr [rsp]
    pop rdx
    pop rdx
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"#
);

unsafe extern "C" {
    fn live_in_registers(rounds: u64, first: u64, out: *mut u64);
}

/// A sum over all registers after so many rounds, at least one, that began with `first`.
pub fn live(rounds: u64, first: u64) -> u64 {
    let mut words = MaybeUninit::<[u64; WORDS as usize]>::uninit();
    let at = words.as_mut_ptr() as u64;
    // Word by word: a compiler that sees a whole array emptied calls a library that is not here.
    (0..WORDS).for_each(|i| store(at + i * 8, 0));
    // SAFETY: it writes less than so many words there, and gives every other register back.
    unsafe { live_in_registers(if rounds == 0 { 1 } else { rounds }, first, at as *mut u64) };
    (0..WORDS).fold(0xcbf2_9ce4_8422_2325, |sum: u64, i| {
        (sum ^ load(at + i * 8)).wrapping_mul(0x100_0000_01b3)
    })
}
