//! Front ends that are not ours: the `virtio-driver` crate drives rings and requests, the `vhost`
//! crate's front end sends the messages that `virtio-driver` does not know.

mod common;

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use common::{DISK_SIZE, Daemon, Rng, capabilities, pattern, readable};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
    VirtioTransport,
};
use vmm_sys_util::eventfd::EventFd;

/// Shared memory for the driver's data.
struct Memory {
    file: std::os::fd::OwnedFd,
    base: *mut u8,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Memory {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len as u64).unwrap();
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping aliases nothing.
        let base =
            unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &file, 0) }.unwrap();
        Memory { file, base: base.cast(), len }
    }

    fn sector(&self, slot: usize) -> *mut u8 {
        assert!((slot + 1) * 512 <= self.len);
        self.base.wrapping_add(slot * 512)
    }

    fn get(&self, slot: usize) -> Vec<u8> {
        // SAFETY: inside the mapping; the driver has no request on this slot now.
        unsafe { std::slice::from_raw_parts(self.sector(slot), 512) }.to_vec()
    }

    fn set(&self, slot: usize, bytes: &[u8]) {
        // SAFETY: as in `get`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.sector(slot), 512) };
    }
}

/// What a sector holds after so many writes.
fn expected(sector: u64, version: u64) -> [u8; 512] {
    let mut want = [0; 512];
    if version > 0 {
        pattern(sector, version, &mut want);
    }
    want
}

/// A verifying load of the foreign driver.
fn drive(features: u64) {
    let daemon = Daemon::new(capabilities(2));
    let path = daemon.path().to_str().unwrap();
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::new(path, features | !0u64 >> 40).unwrap());
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(&mut *transport, 2, 256).unwrap();
    let memory = Memory::new(1 << 20);
    transport.map_mem_region(memory.base as usize, memory.len, memory.file.as_raw_fd(), 0).unwrap();
    let config = transport.get_config().unwrap();
    assert_eq!(u64::from(config.capacity) * 512, DISK_SIZE);
    let mut rng = Rng(common::seed("independent driver"));
    let mut versions: HashMap<u64, u64> = HashMap::new();
    let deadline = Instant::now() + Duration::from_secs(30);
    for round in 0..200 {
        let queue = &mut queues[round % 2];
        let mut sent: HashMap<usize, Option<u64>> = HashMap::new();
        let mut used = std::collections::HashSet::new();
        for slot in 0..40 {
            let sector = rng.below(2000);
            if !used.insert(sector) {
                continue;
            }
            let version = versions.entry(sector).or_default();
            if rng.below(2) == 0 {
                *version += 1;
                let mut bytes = [0; 512];
                pattern(sector, *version, &mut bytes);
                memory.set(slot, &bytes);
                // SAFETY: the slot is mapped and not touched until the completion.
                unsafe { queue.write_raw(sector * 512, memory.sector(slot), 512, slot) }.unwrap();
                sent.insert(slot, None);
            } else {
                // SAFETY: as above.
                unsafe { queue.read_raw(sector * 512, memory.sector(slot), 512, slot) }.unwrap();
                sent.insert(slot, Some(sector));
            }
        }
        if round % 10 == 0 {
            queue.flush(900).unwrap();
            queue.discard(DISK_SIZE - 4096, 4096, 901).unwrap();
            queue.write_zeroes(DISK_SIZE - 8192, 4096, true, 902).unwrap();
            sent.extend([(900, None), (901, None), (902, None)]);
        }
        queue.set_used_notif_enabled(true);
        if queue.avail_notif_needed() {
            transport.get_submission_notifier(round % 2).notify().unwrap();
        }
        while !sent.is_empty() {
            assert!(Instant::now() < deadline, "{} requests never complete", sent.len());
            let bell = transport.get_completion_fd(round % 2);
            if readable(&*bell, 100) {
                let _ = bell.read();
            }
            let queue = &mut queues[round % 2];
            for done in queue.completions() {
                assert_eq!(done.ret, 0);
                if let Some(sector) = sent.remove(&done.context).expect("completes once") {
                    let want = expected(sector, versions[&sector]);
                    assert!(memory.get(done.context) == want, "sector {sector}");
                }
            }
        }
    }
    drop(queues);
    drop(transport);
    daemon.end().unwrap();
}

#[test]
fn virtio_driver_crate_works_on_split_rings() {
    drive(VirtioFeatureFlags::VERSION_1.bits());
}

#[test]
fn virtio_driver_crate_works_with_event_index() {
    drive((VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX).bits());
}

#[test]
fn virtio_driver_crate_works_on_packed_rings() {
    let packed = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_PACKED;
    drive(packed.bits());
    drive((packed | VirtioFeatureFlags::RING_EVENT_IDX).bits());
}

#[test]
fn features_read_the_same_in_another_crate() {
    let daemon = Daemon::new(capabilities(2));
    let path = daemon.path().to_str().unwrap();
    let transport: VhostUser<virtio_driver::VirtioBlkConfig, virtio_driver::VirtioBlkReqBuf> =
        VhostUser::new(path, u64::MAX).unwrap();
    let features = VirtioBlkFeatureFlags::from_bits_truncate(transport.get_features());
    assert!(features.contains(
        VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::MQ
            | VirtioBlkFeatureFlags::DISCARD
            | VirtioBlkFeatureFlags::WRITE_ZEROES
            | VirtioBlkFeatureFlags::CONFIG_WCE
    ));
    let config = transport.get_config().unwrap();
    assert_eq!((config.writeback, u16::from(config.num_queues)), (1, 2));
    assert_eq!(u32::from(config.max_discard_seg), 16);
}

/// Every message of the front end that Cloud Hypervisor uses.
#[test]
fn vhost_crate_front_end_is_understood() {
    let daemon = Daemon::new(capabilities(2));
    let mut front = Frontend::connect(daemon.path(), 2).unwrap();
    front.set_owner().unwrap();
    let features = front.get_features().unwrap() & !vhost_blk::queue::F_RING_PACKED;
    front.set_features(features).unwrap();
    assert_ne!(features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), 0);
    let protocol = front.get_protocol_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::DEVICE_STATE;
    assert!(protocol.contains(wanted));
    front.set_protocol_features(protocol & wanted).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(front.get_queue_num().unwrap(), 2);
    assert_eq!(front.get_max_mem_slots().unwrap(), 256);
    for base in [0, 0x100] {
        let flags = VhostUserConfigFlags::WRITABLE;
        let (head, bytes) = front.get_config(base, 8, flags, &[0; 8]).unwrap();
        assert_eq!({ head.size }, 8);
        assert_eq!(u64::from_le_bytes(bytes.try_into().unwrap()) * 512, DISK_SIZE);
    }
    front.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    front.set_config(32, VhostUserConfigFlags::WRITABLE, &[1]).unwrap();
    assert!(front.set_config(0, VhostUserConfigFlags::WRITABLE, &[0]).is_err());
    run_rings(&mut front);
    front.reset_device().unwrap();
    drop(front);
    daemon.end().unwrap();
}

/// Memory, in-flight area, log and rings, as that front end sets them up.
fn run_rings(front: &mut Frontend) {
    let memory = Memory::new(1 << 20);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 1 << 20,
        userspace_addr: memory.base as u64,
        mmap_offset: 0,
        mmap_handle: memory.file.as_raw_fd(),
    };
    front.set_mem_table(&[region]).unwrap();
    let area = VhostUserInflight { num_queues: 2, queue_size: 128, ..Default::default() };
    let (area, file) = front.get_inflight_fd(&area).unwrap();
    front.set_inflight_fd(&area, file.as_raw_fd()).unwrap();
    let log = Memory::new(4096);
    let log = VhostUserDirtyLogRegion {
        mmap_size: 4096,
        mmap_offset: 0,
        mmap_handle: log.file.as_raw_fd(),
    };
    front.set_log_base(0, Some(log)).unwrap();
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    let base = memory.base as u64;
    let ring = VringConfigData {
        queue_max_size: 256,
        queue_size: 128,
        flags: 0,
        desc_table_addr: base,
        used_ring_addr: base + 8192,
        avail_ring_addr: base + 4096,
        log_addr: None,
    };
    for i in 0..2 {
        front.set_vring_num(i, 128).unwrap();
        front.set_vring_addr(i, &ring).unwrap();
        front.set_vring_base(i, 0).unwrap();
        front.set_vring_call(i, &call).unwrap();
        front.set_vring_kick(i, &kick).unwrap();
        front.set_vring_enable(i, true).unwrap();
        front.set_vring_enable(i, false).unwrap();
    }
    assert_eq!(front.get_vring_base(0).unwrap(), 0);
}

struct KilledAtEnd(std::process::Child);

impl Drop for KilledAtEnd {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Our client drives a device side that is not ours. Needs `qemu-storage-daemon`; says so and
/// passes where there is none.
#[test]
fn our_client_drives_qemu_storage_daemon() {
    use vhost_blk::client::{Client, Op, Options, Span};
    let dir = tempfile::tempdir().unwrap();
    let (disk, socket) = (dir.path().join("disk"), dir.path().join("sock"));
    std::fs::File::create(&disk).unwrap().set_len(DISK_SIZE).unwrap();
    let node = format!("driver=file,node-name=n,discard=unmap,filename={}", disk.display());
    let export = "type=vhost-user-blk,id=e,node-name=n,writable=on,num-queues=2,addr.type=unix";
    let export = format!("{export},addr.path={}", socket.display());
    let daemon = std::process::Command::new("qemu-storage-daemon")
        .args(["--blockdev", &node, "--export", &export])
        .spawn();
    let Ok(daemon) = daemon else {
        println!("skipped: qemu-storage-daemon is not installed");
        return;
    };
    let _daemon = KilledAtEnd(daemon);
    let deadline = Instant::now() + Duration::from_secs(10);
    let options = Options { queues: 2, ..Options::default() };
    let (mut client, mut queues) = loop {
        match Client::connect(&socket, options) {
            Ok(connected) => break connected,
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(client.disk_size().unwrap(), DISK_SIZE);
    for q in &mut queues {
        let mut bytes = [0; 4096];
        pattern(5, 1, &mut bytes);
        let (at, back) = (q.data().0, q.data().0 + 8192);
        q.arena().write(at, &bytes);
        let mut run = |op, offset, spans: &[Span]| q.run(op, offset, spans, 10_000).unwrap().status;
        assert_eq!(run(Op::Write, 65536, &[Span { offset: at, len: 4096 }]), 0);
        assert_eq!(run(Op::Flush, 0, &[]), 0);
        let zeroes = Op::WriteZeroes { ranges: &[(65536, 512)], unmap: true };
        assert_eq!(run(zeroes, 0, &[]), 0);
        assert_eq!(run(Op::Discard(&[(1 << 20, 4096)]), 0, &[]), 0);
        assert_eq!(run(Op::Read, DISK_SIZE, &[Span { offset: back, len: 512 }]), 1);
        assert_eq!(run(Op::Read, 65536, &[Span { offset: back, len: 4096 }]), 0);
        bytes[..512].fill(0);
        let mut seen = [0; 4096];
        q.arena().read(back, &mut seen);
        assert!(seen == bytes);
    }
    std::thread::scope(|scope| {
        for (i, mut q) in queues.into_iter().enumerate() {
            scope.spawn(move || common::load(&mut q, i as u64, 2, |done| done < 2000));
        }
    });
    client.stop_queue(1).unwrap();
}
