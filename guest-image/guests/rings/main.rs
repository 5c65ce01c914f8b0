//! A program for Linux guests that changes the sizes of a network card's rings, which takes ethtool
//! otherwise.
//!
//! `rings INTERFACE COUNT`: both the receiving and the transmitting rings have COUNT descriptors then.
//! Freestanding, as `vsock` is; exit status 1 if a system call fails.

#![no_std]
#![no_main]

#[path = "../linux/sys.rs"]
mod sys;

use sys::{call, exit, number};

/// System calls.
const IOCTL: usize = 16;
const SOCKET: usize = 41;

/// socket(2), and netdevice(7)'s request for ethtool's (linux/sockios.h).
const AF_INET: usize = 2;
const SOCK_DGRAM: usize = 2;
const SIOCETHTOOL: usize = 0x8946;

/// linux/ethtool.h.
const ETHTOOL_GRINGPARAM: u32 = 0x10;
const ETHTOOL_SRINGPARAM: u32 = 0x11;

/// struct ethtool_ringparam: the most there can be of each kind of ring, then what there is.
#[repr(C)]
#[derive(Default)]
struct Rings {
    command: u32,
    most: [u32; 4],
    receive: u32,
    receive_mini: u32,
    receive_jumbo: u32,
    transmit: u32,
}

/// struct ifreq.
#[repr(C)]
struct Request {
    name: [u8; 16],
    data: *mut Rings,
    rest: [u64; 2],
}

extern "C" fn entry(stack: *const usize) -> ! {
    // SAFETY: the kernel starts a program with the number of its arguments, and then their addresses,
    // on the stack; each ends with a zero.
    let (count, words) = unsafe { (*stack, [*stack.add(2), *stack.add(3)]) };
    if count != 3 {
        exit(2);
    }
    let [interface, digits] = words.map(|word| word as *const u8);
    let mut name = [0; 16];
    for (at, byte) in name.iter_mut().take(15).enumerate() {
        // SAFETY: as above; nothing is read behind the zero.
        *byte = unsafe { *interface.add(at) };
        if *byte == 0 {
            break;
        }
    }
    // SAFETY: as above.
    let count = unsafe { number(digits) };
    let mut rings = Rings::default();
    let request = Request {
        name,
        data: &raw mut rings,
        rest: [0; 2],
    };
    let socket = call(SOCKET, AF_INET, SOCK_DGRAM, 0);
    let ask = |command, change: fn(&mut Rings, u32)| {
        // SAFETY: the kernel is done with it between two calls.
        let rings = unsafe { &mut *request.data };
        change(rings, count);
        rings.command = command;
        call(IOCTL, socket, SIOCETHTOOL, &raw const request as usize);
    };
    ask(ETHTOOL_GRINGPARAM, |_, _| ());
    ask(ETHTOOL_SRINGPARAM, |rings, count| {
        (rings.receive, rings.transmit) = (count, count);
    });
    exit(0)
}
