//! Front ends that break the protocol, and clients of NBD that do.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use offshoot_tests::nbd;
use offshoot_tests::rng::Rng;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_blk::client::{Client, FrontEnd, Op, Span};
use vhost_blk::proto::{
    F_PROTOCOL_FEATURES, FLAG_NEED_REPLY, FLAG_VERSION, MemRegion, SingleMemRegion, VringAddr,
    VringState, request,
};
use vhost_blk::queue::F_VERSION_1;
use vhost_blk::session::PROTOCOL_FEATURES;

use super::{Target, options};

const MEMORY: u64 = 1 << 20;
const USER: u64 = 0x7000_0000;

fn memory(len: u64) -> OwnedFd {
    let file = memfd_create("hostile", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, len).unwrap();
    file
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let header = [code, flags, size].map(u32::to_ne_bytes).concat();
    [&header, payload].concat()
}

/// A front end that negotiated everything and shares this memory, at address 0 of its guest.
fn negotiated(socket: &Path, memory: BorrowedFd<'_>) -> format::Result<FrontEnd> {
    let mut front = FrontEnd::connect(socket)?;
    front.tell(request::SET_OWNER, &[0u8; 0], &[])?;
    front.tell(request::SET_PROTOCOL_FEATURES, &PROTOCOL_FEATURES, &[])?;
    front.set_acks(true);
    front.tell(request::SET_FEATURES, &(F_VERSION_1 | F_PROTOCOL_FEATURES), &[])?;
    let region = MemRegion { guest: 0, size: MEMORY, user: USER, offset: 0 };
    front.tell(request::ADD_MEM_REG, &SingleMemRegion { padding: 0, region }, &[memory])?;
    Ok(front)
}

fn start_ring(front: &mut FrontEnd, kick: BorrowedFd<'_>) -> format::Result<()> {
    let addr =
        VringAddr { index: 0, flags: 0, desc: USER, used: USER + 8192, avail: USER + 4096, log: 0 };
    front.tell(request::SET_VRING_NUM, &VringState { index: 0, num: 128 }, &[])?;
    front.tell(request::SET_VRING_ADDR, &addr, &[])?;
    front.tell(request::SET_VRING_KICK, &0u64, &[kick])?;
    front.tell(request::SET_VRING_ENABLE, &VringState { index: 0, num: 1 }, &[])
}

/// One message, often of a known shape, with values that are likely to hurt.
fn random_message(rng: &mut Rng) -> (Vec<u8>, Vec<OwnedFd>) {
    let codes = if rng.one_in(20) { 70 } else { 43 };
    let code = u32::try_from(1 + rng.below(codes)).unwrap();
    let len = match (rng.below(12), code) {
        (0, _) => rng.below(100),
        (_, 1 | 3 | 4 | 15 | 17 | 34 | 36 | 40 | 43) => 0,
        (_, 5 | 9 | 37 | 38) => 40,
        (_, 6) => 16,
        (_, 24 | 25) => 13,
        (_, 31 | 32) => 24,
        _ => 8,
    };
    let values =
        [0, 1, 2, 8, 64, 128, 4096, MEMORY, USER, USER + 4096, USER + 8192, 1 << 40, u64::MAX];
    let mut payload = Vec::new();
    while (payload.len() as u64) < len {
        let value = values[usize::try_from(rng.below(values.len() as u64)).unwrap()];
        let bytes = value.to_le_bytes();
        payload.extend(if rng.one_in(2) { &bytes[..] } else { &bytes[..4] });
    }
    payload.truncate(usize::try_from(len).unwrap());
    let wanted = matches!(code, 5 | 6 | 7 | 12 | 13 | 14 | 21 | 32 | 37 | 42);
    let count = if rng.one_in(12) { rng.below(4) } else { u64::from(wanted) };
    let fds = (0..count).map(|_| match rng.below(8) {
        0 => UnixStream::pair().unwrap().0.into(),
        1..5 => bell(),
        _ => memory(values[usize::try_from(rng.below(9)).unwrap()]),
    });
    let fds: Vec<OwnedFd> = fds.collect();
    let odd = u32::try_from(rng.below(64)).unwrap();
    let flags = if rng.one_in(30) { odd } else { FLAG_VERSION | FLAG_NEED_REPLY };
    (message(code, flags, &payload), fds)
}

/// Messages with random content, to sessions in all states.
pub fn random_messages(target: &mut Target) {
    let shared = memory(MEMORY);
    for round in 0..target.rounds * 400 {
        // A session that a while ago has not ended may still have its place.
        let front = match round % 3 {
            0 => FrontEnd::connect(&target.vhost),
            _ => negotiated(&target.vhost, shared.as_fd()),
        };
        let Ok(mut front) = front else { continue };
        if round % 3 == 2 {
            let _ = start_ring(&mut front, bell().as_fd());
        }
        for _ in 0..40 {
            let (bytes, fds) = random_message(&mut target.rng);
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            if front.send_raw(&bytes, &fds).is_err() {
                break;
            }
        }
    }
}

/// Messages that end too early, say that they are longer than they are, or never end.
pub fn torn_messages(target: &mut Target) {
    let shared = memory(MEMORY);
    let whole = message(request::SET_FEATURES, FLAG_VERSION, &[0; 8]);
    let mut waiting = Vec::new();
    for round in 0..target.rounds * 300 {
        let Ok(mut front) = negotiated(&target.vhost, shared.as_fd()) else { continue };
        let cut = usize::try_from(target.rng.below(whole.len() as u64)).unwrap();
        let mut bytes = whole[..cut].to_vec();
        if round % 4 == 0 && cut == 12 {
            bytes[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        }
        let _ = front.send_raw(&bytes, &[]);
        if round % 16 == 0 {
            waiting.push(front);
        }
        if waiting.len() == 3 {
            waiting.clear();
        }
    }
}

/// Descriptors that are not what they are sent as.
pub fn wrong_descriptors(target: &mut Target) {
    let dir = tempfile::tempdir().unwrap();
    let file = File::create_new(dir.path().join("file")).unwrap();
    let (left, right) = UnixStream::pair().unwrap();
    (&left).write_all(&[1; 4096]).unwrap();
    let (read_end, write_end) = rustix::pipe::pipe().unwrap();
    let wrong: Vec<OwnedFd> = vec![
        // Readable for ever: a doorbell that never stops ringing.
        File::open("/dev/zero").unwrap().into(),
        File::options().write(true).open("/dev/full").unwrap().into(),
        File::open(dir.path()).unwrap().into(),
        file.into(),
        right.into(),
        left.into(),
        read_end,
        write_end,
        memory(0),
        memory(4096),
        bell(),
    ];
    let shared = memory(MEMORY);
    for _ in 0..target.rounds * 10 {
        for fd in &wrong {
            let fd = fd.as_fd();
            // As memory, as doorbells of a ring that runs, and for everything else.
            drop(negotiated(&target.vhost, fd));
            let Ok(mut front) = negotiated(&target.vhost, shared.as_fd()) else { continue };
            let _ = start_ring(&mut front, fd);
            for code in [
                request::SET_VRING_CALL,
                request::SET_VRING_ERR,
                request::SET_BACKEND_REQ_FD,
                request::SET_LOG_FD,
            ] {
                let _ = front.tell(code, &0u64, &[fd]);
            }
            let area = [4096u64, 0, 1 | 128 << 16];
            let _ = front.tell(request::SET_INFLIGHT_FD, &area, &[fd]);
            let _ = front.send_raw(&message(request::SET_LOG_BASE, FLAG_VERSION, &[1; 16]), &[fd]);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Memory that is gone while a ring in it runs.
pub fn cut_memory(target: &mut Target) {
    for _ in 0..target.rounds * 60 {
        let shared = memory(MEMORY);
        let Ok(mut front) = negotiated(&target.vhost, shared.as_fd()) else { continue };
        let kick = bell();
        let started = start_ring(&mut front, kick.as_fd());
        ftruncate(&shared, target.rng.below(3) * 4096).unwrap();
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        if started.is_ok() {
            let gone = front.ask::<_, u64>(request::GET_QUEUE_NUM, &[0u8; 0], &[]);
            // Told either way: the answer, or the end of the session.
            drop(gone);
        }
    }
}

/// More front ends than may be connected, some that stay and say nothing, and many that only look.
pub fn crowd(target: &mut Target) {
    for _ in 0..target.rounds * 5 {
        let idle: Vec<_> =
            (0..20).filter_map(|_| UnixStream::connect(&target.vhost).ok()).collect();
        for _ in 0..400 {
            let _ = UnixStream::connect(&target.vhost);
        }
        drop(idle);
        // As soon as those are gone there is room again.
        let mut connected = None;
        super::until("there is room", || {
            connected = Client::connect(&target.vhost, options(1)).ok();
            connected.is_some()
        });
        let (_client, mut queues) = connected.unwrap();
        let sector = Span { offset: queues[0].data().0, len: 512 };
        assert_eq!(queues[0].run(Op::Read, 0, &[sector], 20_000).unwrap().status, 0);
    }
}

/// Bytes that are no NBD, before and after the handshake.
pub fn nbd_garbage(target: &mut Target) {
    for round in 0..target.rounds * 300 {
        let bytes: Vec<u8> = (0..1000).flat_map(|_| target.rng.any().to_le_bytes()).collect();
        let mut socket = match round % 3 {
            0 => UnixStream::connect(&target.nbd).unwrap(),
            1 => nbd::Client::connect(&target.nbd).greeted().socket,
            _ => {
                let mut client = nbd::Client::connect(&target.nbd).greeted();
                client.go("a");
                client.socket
            }
        };
        // The server closes it somewhere in between.
        let _ = socket.write_all(&bytes);
    }
}
