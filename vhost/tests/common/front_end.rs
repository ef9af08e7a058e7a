//! A front end that knows the protocol well enough to break it. Tests of the daemon use it, too.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use format::Result;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_blk::client::FrontEnd;
use vhost_blk::proto::{
    F_PROTOCOL_FEATURES, FLAG_NEED_REPLY, FLAG_VERSION, MemRegion, SingleMemRegion, VringAddr,
    VringState, feature, request,
};
use vhost_blk::queue::F_VERSION_1;
use vhost_blk::session::PROTOCOL_FEATURES;

/// Bytes of guest memory, and where the front end says that it has it.
pub const MEMORY: u64 = 1 << 20;
pub const USER: u64 = 0x7000_0000;

pub fn memfd(len: u64) -> OwnedFd {
    let fd = memfd_create("lie", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, len).unwrap();
    fd
}

pub fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

pub fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let header = [code, flags, size].map(u32::to_ne_bytes).concat();
    [&header, payload].concat()
}

/// A front end that negotiated everything and shares this memory, at address 0 of its guest, but
/// started no ring.
pub fn negotiated(socket: &Path, acks: bool, memory: BorrowedFd<'_>) -> Result<FrontEnd> {
    let mut front = FrontEnd::connect(socket)?;
    front.tell(request::SET_OWNER, &[0u8; 0], &[])?;
    let protocol = if acks { PROTOCOL_FEATURES } else { PROTOCOL_FEATURES & !feature::REPLY_ACK };
    front.tell(request::SET_PROTOCOL_FEATURES, &protocol, &[])?;
    front.set_acks(acks);
    front.tell(request::SET_FEATURES, &(F_VERSION_1 | F_PROTOCOL_FEATURES), &[])?;
    let region = MemRegion { guest: 0, size: MEMORY, user: USER, offset: 0 };
    front.tell(request::ADD_MEM_REG, &single(region), &[memory])?;
    Ok(front)
}

pub fn single(region: MemRegion) -> SingleMemRegion {
    SingleMemRegion { padding: 0, region }
}

/// Where ring `index` lies.
pub fn addr(index: u32, desc: u64) -> VringAddr {
    let (used, avail) = (desc + 8192, desc + 4096);
    VringAddr { index, flags: 0, desc, used, avail, log: 0 }
}

pub fn start_ring(front: &mut FrontEnd, desc: u64, kick: BorrowedFd<'_>) -> Result<()> {
    front.tell(request::SET_VRING_NUM, &VringState { index: 0, num: 128 }, &[])?;
    front.tell(request::SET_VRING_ADDR, &addr(0, desc), &[])?;
    front.tell(request::SET_VRING_KICK, &0u64, &[kick])?;
    front.tell(request::SET_VRING_ENABLE, &VringState { index: 0, num: 1 }, &[])
}

/// One message of the fuzzer: often of a known shape, with values that are likely to hurt.
pub fn random_message(any: &mut dyn FnMut() -> u64) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut below = |n: u64| any() % n;
    let codes = [
        1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 21, 24, 25, 31, 32, 34, 36, 37,
        38, 39, 40, 42, 43,
    ];
    let code = match below(20) {
        0 => u32::try_from(below(60)).unwrap(),
        _ => codes[usize::try_from(below(codes.len() as u64)).unwrap()],
    };
    let len = match (below(12), code) {
        (0, _) => below(100),
        (_, 1 | 3 | 4 | 15 | 17 | 34 | 36 | 40 | 43) => 0,
        (_, 5 | 9 | 37 | 38) => 40,
        (_, 6) => 16,
        (_, 24 | 25) => 13,
        (_, 31 | 32) => 24,
        _ => 8,
    };
    let values =
        [0u64, 1, 2, 8, 64, 128, 4096, MEMORY, USER, USER + 4096, USER + 8192, 1 << 40, u64::MAX];
    let mut payload = Vec::new();
    while (payload.len() as u64) < len {
        let value = values[usize::try_from(below(values.len() as u64)).unwrap()];
        if below(2) == 0 {
            payload.extend(value.to_ne_bytes());
        } else {
            payload.extend(u32::try_from(value & 0xffff_ffff).unwrap().to_ne_bytes());
        }
    }
    payload.truncate(usize::try_from(len).unwrap());
    let wanted = matches!(code, 5 | 6 | 7 | 12 | 13 | 14 | 21 | 32 | 37 | 42);
    let count = match below(12) {
        0 => below(4),
        _ => u64::from(wanted),
    };
    let fds = (0..count).map(|_| match (below(8), code) {
        (0, _) => std::os::unix::net::UnixStream::pair().unwrap().0.into(),
        (1..6, 12..=14) | (1, _) => bell(),
        _ => memfd(values[usize::try_from(below(9)).unwrap()]),
    });
    let fds: Vec<OwnedFd> = fds.collect();
    let flags = if below(30) == 0 { below(64) } else { u64::from(FLAG_VERSION | FLAG_NEED_REPLY) };
    (message(code, u32::try_from(flags).unwrap(), &payload), fds)
}
