// The switch between stacks.
//
// simt_switch(save, stack_pointer) pushes the registers that a function keeps for its caller, leaves the stack pointer
// in *save and pops the same registers from the other stack. What rounds and traps is not switched: kernels leave it.
#pragma once

extern "C" __attribute__((visibility("hidden"))) void simt_switch(void** save, void* stack_pointer);

// A fresh stack has `saved_words` on top, of which `return_word` is where the first switch to it goes.
#if defined(__x86_64__) && defined(__ELF__)

constexpr unsigned saved_words = 8;  // six registers, the address, and one that the entered function sees as its caller
constexpr unsigned return_word = 6;
asm(R"(
.pushsection .text
.p2align 4
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, . - simt_switch
.popsection
)");

#elif defined(__aarch64__) && defined(__ELF__)

constexpr unsigned saved_words = 20;
constexpr unsigned return_word = 11;  // x30
asm(R"(
.pushsection .text
.p2align 4
.globl simt_switch
.hidden simt_switch
.type simt_switch, %function
simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size simt_switch, . - simt_switch
.popsection
)");

#else
#error "the switch between stacks is written for x86-64 and aarch64, ELF"
#endif
