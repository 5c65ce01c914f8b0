//! A program for Linux guests that speaks AF_VSOCK, which busybox does not.
//!
//! `vsock listen PORT` takes one connection and sends back what comes on it. `vsock connect PORT`
//! connects to the host, sends standard input, and prints what comes back. Freestanding, so that it
//! needs no library in the guest; exit status 1 if a system call fails.

#![no_std]
#![no_main]

#[path = "../linux/sys.rs"]
mod sys;

use sys::{call, exit, number};

/// System calls (arch/x86/entry/syscalls/syscall_64.tbl).
const READ: usize = 0;
const WRITE: usize = 1;
const SOCKET: usize = 41;
const CONNECT: usize = 42;
const ACCEPT: usize = 43;
const SHUTDOWN: usize = 48;
const BIND: usize = 49;
const LISTEN: usize = 50;

/// vsock(7).
const AF_VSOCK: u16 = 40;
const SOCK_STREAM: usize = 1;
const CID_ANY: u32 = u32::MAX;
const CID_HOST: u32 = 2;
const SHUT_WR: usize = 1;

/// struct sockaddr_vm.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: u32,
}

impl Address {
    fn new(cid: u32, port: u32) -> Self {
        Self {
            family: AF_VSOCK,
            reserved: 0,
            port,
            cid,
            zero: 0,
        }
    }
}

/// What is on its way. Only its address is taken.
static mut BYTES: [u8; 4096] = [0; 4096];

/// Copies from one descriptor to another until the end.
fn copy(from: usize, to: usize) {
    let bytes = &raw mut BYTES as usize;
    loop {
        let count = call(READ, from, bytes, 4096);
        if count == 0 {
            return;
        }
        let mut done = 0;
        while done < count {
            done += call(WRITE, to, bytes + done, count - done);
        }
    }
}

extern "C" fn entry(stack: *const usize) -> ! {
    // SAFETY: the kernel starts a program with the number of its arguments, and then their addresses,
    // on the stack; each ends with a zero.
    let (count, words) = unsafe { (*stack, [*stack.add(2), *stack.add(3)]) };
    if count != 3 {
        exit(2);
    }
    let [verb, digits] = words.map(|word| word as *const u8);
    // SAFETY: as above.
    let (verb, port) = unsafe { (*verb, number(digits)) };
    let socket = call(SOCKET, AF_VSOCK.into(), SOCK_STREAM, 0);
    let size = size_of::<Address>();
    if verb == b'l' {
        let address = Address::new(CID_ANY, port);
        call(BIND, socket, &raw const address as usize, size);
        call(LISTEN, socket, 1, 0);
        let connection = call(ACCEPT, socket, 0, 0);
        copy(connection, connection);
    } else {
        let address = Address::new(CID_HOST, port);
        call(CONNECT, socket, &raw const address as usize, size);
        copy(0, socket);
        call(SHUTDOWN, socket, SHUT_WR, 0);
        copy(socket, 1);
    }
    exit(0)
}
