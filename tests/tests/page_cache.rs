//! A long import leaves the memory of the host to others: what it stored is on its way to the
//! device and out of the page cache before the end, however long the image is.

use std::fs::{self, File};
use std::io::IoSliceMut;
use std::path::Path;
use std::time::{Duration, Instant};

use blockd::disk::Disk;
use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{NewDisk, OpenOptions, StoreDir, boot_id};
use format::entry::BlockState;
use format::units::GuestBlock;
use offshoot_tests::skip;
use rustix::io::{Errno, ReadWriteFlags, preadv2};

const PIECE: usize = 2 << 20;
const SIZE: u64 = 256 << 20;
/// For a device that is very slow, or very busy.
const LIMIT: Duration = Duration::from_secs(60);
const TMPFS: i64 = 0x0102_1994;

/// Whether the host can give the bytes at `offset` without asking the device.
fn is_cached(file: &File, offset: u64) -> bool {
    let mut byte = [0];
    match preadv2(file, &mut [IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT) {
        Ok(count) => count == 1,
        Err(Errno::AGAIN) => false,
        Err(e) => panic!("the file cannot be read: {e}"),
    }
}

/// Where the first block of the disk lies in its file.
fn first_block(disk: &Disk) -> u64 {
    match disk.map().block(GuestBlock(0)).unwrap() {
        BlockState::Data { block, .. } => block.file_offset(),
        state => panic!("the first block is {state:?}"),
    }
}

fn only_file(dir: &Path, extension: &str) -> File {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut found = files.filter(|path| path.extension().is_some_and(|e| e == extension));
    let path = found.next().expect("there is one");
    assert!(found.next().is_none());
    File::open(path).unwrap()
}

/// The story: an import of 1 GiB through the page cache left all of it to the sync at the end, so
/// that the device was idle first and the processor then, and the host's memory was full of an
/// image that nobody reads.
#[test]
fn what_an_import_stored_leaves_the_page_cache_before_the_end() {
    let dir = tempfile::tempdir().unwrap();
    if rustix::fs::statfs(dir.path()).unwrap().f_type == TMPFS {
        let reason = "the folder for temporary files is in memory";
        return skip("what_an_import_stored_leaves_the_page_cache_before_the_end", reason);
    }
    let path = dir.path().join("store");
    StoreDir::init(&path, None).unwrap();
    let how = OpenOptions { access: Access::Write, cache: CacheMode::Buffered, boot: boot_id() };
    let store = StoreDir::open(&path, &how).unwrap();
    let import = store.import(&NewDisk::root("disk", SIZE), 1).unwrap();
    let bytes = vec![0xa5; PIECE];
    import.store(0, 0, &bytes).unwrap();
    let (file, offset) = (only_file(&path, "new"), first_block(import.disk()));
    assert!(is_cached(&file, offset));

    let start = Instant::now();
    let mut pieces = (PIECE as u64..SIZE).step_by(PIECE).cycle();
    while is_cached(&file, offset) {
        assert!(start.elapsed() < LIMIT, "the first piece is still in the page cache");
        import.store(0, pieces.next().unwrap(), &bytes).unwrap();
    }

    import.finish().unwrap();
    let disk = store.open_disk("disk", Access::Read, &store.disk_options()).unwrap();
    let mut back = vec![0; PIECE];
    disk.read(0, 0, &mut back).unwrap();
    assert!(back == bytes);
}
