use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::buf::{ALIGN, AlignedBuf};
use super::super::{ReadOp, WriteOp, conformance};
use super::bounce::Align;
use super::*;

fn open(dir: &Path, cache: CacheMode) -> FileStore {
    FileStore::open(dir, FileStoreOptions { cache })
        .expect("these tests need a TMPDIR on a file system with direct I/O")
}

fn kind<T>(result: Result<T>) -> Option<Kind> {
    result.err().map(|e| e.kind())
}

/// Warnings that were emitted while `work` ran on this thread.
fn warnings(work: impl FnOnce()) -> usize {
    struct Count(Arc<AtomicUsize>);
    impl tracing::Subscriber for Count {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, event: &tracing::Event<'_>) {
            let warning = *event.metadata().level() == tracing::Level::WARN;
            // Read by the same thread only.
            self.0.fetch_add(usize::from(warning), Ordering::Relaxed);
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }
    let count = Arc::new(AtomicUsize::new(0));
    tracing::subscriber::with_default(Count(Arc::clone(&count)), work);
    count.load(Ordering::Relaxed)
}

#[test]
fn buffered_store_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), CacheMode::Buffered);

    conformance::store(&store);

    assert!(matches!(store.cache(), Effective::Buffered { .. }));
    let file = store.create("a").unwrap();
    assert!(!file.is_direct());
    conformance::concurrent(&file);
}

#[test]
fn direct_store_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), CacheMode::Direct);

    conformance::store(&store);

    assert_eq!(store.cache(), Effective::Direct);
    let file = store.create("a").unwrap();
    assert!(file.is_direct());
    conformance::concurrent(&file);
}

/// The bounce buffer and its read-modify-write, for hosts that ask for more and for less than this
/// one does.
#[test]
fn direct_file_conforms_for_every_alignment() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), CacheMode::Direct);
    drop(store.create("probe").unwrap());
    let fd = store.open_file("probe", OFlags::RDWR | OFlags::DIRECT).unwrap();
    let least = probe::alignment(fd.as_fd()).unwrap();
    for offset in [512, 1024, 4096].into_iter().filter(|bytes| *bytes >= least.offset) {
        let fd = store.open_file("probe", OFlags::RDWR | OFlags::DIRECT).unwrap();
        let file = FileHandle {
            fd,
            path: "probe".into(),
            writable: true,
            direct: Some(Align { memory: ALIGN, offset }),
            growth: RwLock::new(()),
            turn: Mutex::new(()),
            rings: Arc::new(Rings::new()),
        };
        conformance::file(&file);
    }
}

#[test]
fn store_without_io_uring_conforms_and_says_it_once() {
    for cache in [CacheMode::Buffered, CacheMode::Direct] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path(), cache);
        let said = warnings(|| {
            for errno in [Errno::NOMEM, Errno::NOSYS, Errno::PERM] {
                store.rings.give_up(&errno.into());
            }
            conformance::store(&store);
        });
        assert_eq!(said, 1);
    }
}

#[test]
fn unaligned_direct_writes_of_threads_keep_their_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), CacheMode::Direct);
    let file = store.create("a").unwrap();
    file.set_len(8192).unwrap();

    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let file = &file;
            scope.spawn(move || {
                for i in (u64::from(thread)..8000).step_by(4).take(100) {
                    file.write_at(i, &[thread + 1]).unwrap();
                }
            });
        }
    });

    let mut bytes = vec![0; 8192];
    file.read_at(0, &mut bytes).unwrap();
    let expected = |i: usize| if i < 400 { u8::try_from(i % 4).unwrap() + 1 } else { 0 };
    assert!(bytes.iter().enumerate().all(|(i, byte)| *byte == expected(i)));
}

#[test]
fn long_writes_of_threads_arrive_whole_whatever_is_written_behind_them() {
    const LEN: usize = (1 << 20) + 3;
    let dir = tempfile::tempdir().unwrap();
    for cache in [CacheMode::Buffered, CacheMode::Direct] {
        let store = open(dir.path(), cache);
        let file = store.create(&format!("{cache:?}")).unwrap();

        std::thread::scope(|scope| {
            for thread in 0..4_u8 {
                let file = &file;
                scope.spawn(move || {
                    file.write_at(u64::from(thread) * LEN as u64, &[thread + 1; LEN]).unwrap();
                    file.write_behind();
                    file.write_out();
                });
            }
        });

        let mut bytes = vec![0; 4 * LEN];
        file.read_at(0, &mut bytes).unwrap();
        for (thread, part) in (1..).zip(bytes.chunks(LEN)) {
            assert!(part.iter().all(|byte| *byte == thread), "{cache:?}: thread {thread}");
        }
    }
}

#[test]
fn direct_and_buffered_stores_see_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let direct = open(dir.path(), CacheMode::Direct);
    let buffered = open(dir.path(), CacheMode::Buffered);
    let bytes: Vec<u8> = (0..=250).cycle().take(100_001).collect();

    direct.create("a").unwrap().write_at(3, &bytes).unwrap();

    let file = buffered.open("a", Access::Read).unwrap();
    assert_eq!(file.size().unwrap(), 100_004);
    let mut back = vec![1; 100_004];
    file.read_at(0, &mut back).unwrap();
    assert!(back[..3] == [0; 3] && back[3..] == bytes[..]);
}

#[test]
fn what_is_not_a_regular_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), CacheMode::Auto);
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("dangling")).unwrap();
    rustix::fs::mknodat(&store.dir, "pipe", FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap());

    for name in ["folder", "link", "dangling", "pipe", "socket"] {
        for access in [Access::Read, Access::Write] {
            assert_eq!(kind(store.open(name, access)), Some(Kind::Invalid), "{name}");
        }
        assert_eq!(kind(store.create(name)), Some(Kind::Exists), "{name}");
        assert_eq!(kind(store.remove(name)), Some(Kind::Invalid), "{name}");
        assert_eq!(kind(store.rename(name, "x")), Some(Kind::Invalid), "{name}");
        assert_eq!(kind(store.lock(name, LockKind::Shared)), Some(Kind::Invalid), "{name}");
    }
    assert_eq!(kind(store.rename("file", "folder")), Some(Kind::Invalid));
    assert_eq!(store.names().unwrap(), ["file"]);
    let e = store.open("folder", Access::Write).err().unwrap().to_string();
    assert!(e.contains("folder: is a directory, not a file"), "{e}");
}

#[test]
fn store_folder_must_be_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    let open = |name| FileStore::open(&dir.path().join(name), FileStoreOptions::default());

    assert_eq!(kind(open("missing")), Some(Kind::NotFound));
    assert_eq!(kind(open("file")), Some(Kind::Invalid));
    assert!(open("file").err().unwrap().to_string().contains("store folder"));
}

/// The proc file system refuses direct I/O on every Linux.
#[test]
fn file_system_without_direct_io_falls_back_aloud() {
    let proc = Path::new("/proc/self");
    let mut store = None;
    let said = warnings(|| store = Some(open(proc, CacheMode::Auto)));

    let store = store.unwrap();
    let Effective::Buffered { reason } = store.cache() else { panic!("direct on /proc") };
    assert!(reason.contains("direct I/O"), "{reason}");
    assert_eq!(said, 1);
    let file = store.open("status", Access::Read).unwrap();
    let mut bytes = [0; 5];
    file.read_at(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"Name:");

    let e = FileStore::open(proc, FileStoreOptions { cache: CacheMode::Direct }).err().unwrap();
    assert_eq!(e.kind(), Kind::Unsupported);
    assert!(e.next_step().is_some_and(|hint| hint.contains("buffered")), "{e}");
    let asked = warnings(|| drop(open(proc, CacheMode::Buffered)));
    assert_eq!(asked, 0);
}

#[test]
fn probe_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();

    assert_eq!(open(dir.path(), CacheMode::Auto).cache(), Effective::Direct);

    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn names_that_are_not_utf8_are_left_out() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), CacheMode::Auto);
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff");
    std::fs::write(dir.path().join(odd), "x").unwrap();
    store.create("even").unwrap();

    assert_eq!(store.names().unwrap(), ["even"]);
}

#[test]
fn locks_conflict_between_handles_and_end_with_their_guard() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(dir.path(), CacheMode::Auto), open(dir.path(), CacheMode::Auto));
    assert_eq!(kind(one.lock("lock", LockKind::Shared)), Some(Kind::NotFound));
    one.create("lock").unwrap();

    let exclusive = one.lock("lock", LockKind::Exclusive).unwrap();
    for store in [&one, &two] {
        assert_eq!(kind(store.lock("lock", LockKind::Exclusive)), Some(Kind::Busy));
        assert_eq!(kind(store.lock("lock", LockKind::Shared)), Some(Kind::Busy));
    }
    let e = two.lock("lock", LockKind::Shared).unwrap_err().to_string();
    assert!(e.contains("cannot lock") && e.contains("another process has it open"), "{e}");
    // A classic record lock would be lost when any handle of the file is closed.
    drop(one.open("lock", Access::Write).unwrap());
    assert_eq!(kind(two.lock("lock", LockKind::Shared)), Some(Kind::Busy));
    drop(exclusive);

    let shared = one.lock("lock", LockKind::Shared).unwrap();
    let also_shared = two.lock("lock", LockKind::Shared).unwrap();
    assert_eq!(kind(two.lock("lock", LockKind::Exclusive)), Some(Kind::Busy));
    drop((shared, also_shared));
    two.lock("lock", LockKind::Exclusive).unwrap();
}

#[test]
fn errors_name_the_file_and_what_was_tried() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), CacheMode::Auto);
    let file = store.create("disk 1").unwrap();

    let e = file.read_at(512, &mut [0; 7]).unwrap_err().to_string();

    let path = dir.path().join("disk 1").display().to_string();
    assert_eq!(e, format!("cannot read 7 bytes at offset 512 of {path}: the file ends early"));
    let mut bufs = [AlignedBuf::zeroed(4096), AlignedBuf::zeroed(4096)];
    let mut ops = bufs.each_mut().map(|buf| ReadOp { offset: 8192, buf });
    let e = file.read_many(&mut ops).unwrap_err().to_string();
    assert_eq!(e, format!("cannot read 4096 bytes at offset 8192 of {path}: the file ends early"));
}

/// Writes to a full device fail with `NoSpace`, from one call and from a batch.
#[test]
fn full_device_is_reported_as_no_space() {
    let full = std::fs::OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    for direct in [None, Some(Align { memory: 1, offset: 1 })] {
        let file = FileHandle {
            fd: full.try_clone().unwrap().into(),
            path: "/dev/full".into(),
            writable: true,
            direct,
            growth: RwLock::new(()),
            turn: Mutex::new(()),
            rings: Arc::new(Rings::new()),
        };
        let op = WriteOp { offset: 0, buf: &[1; 4096] };
        assert_eq!(kind(file.write_at(0, op.buf)), Some(Kind::NoSpace));
        assert_eq!(kind(file.write_many(&[op; 100])), Some(Kind::NoSpace));
    }
}
