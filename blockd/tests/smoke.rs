//! A disk over the simulated store: what is written is read, flushed, reopened and sealed.

use std::sync::Arc;

use blockd::disk::create::NewSegment;
use blockd::disk::{Disk, Options};
use blockd::segment::{Sealed, Segments, file_name, new_name};
use blockd::store::sim::SimStore;
use blockd::store::{Access, Store};
use format::superblock::Mode;
use format::units::OwnerEpoch;
use format::{Error, Kind, Result};
use uuid::Uuid;

struct NoParents;

impl Segments for NoParents {
    fn sealed(&self, segment: Uuid) -> Result<Arc<Sealed>> {
        Err(Error::new(Kind::ParentMissing, "no such segment").on(segment.to_string()))
    }
}

#[test]
fn written_data_survives_reopen_and_seal() {
    let store = SimStore::new();
    let id = Uuid::from_u128(9);
    let new = NewSegment {
        store: Uuid::from_u128(1),
        segment: id,
        disk: Uuid::from_u128(2),
        name: "a".into(),
        virtual_size: 100 << 20,
        journal_extents: 1,
        created: 0,
        owner_epoch: OwnerEpoch(1),
        mode: Mode::Persistent,
        base: Uuid::nil(),
    };
    new.write(&store, None).unwrap();
    store.rename(&new_name(id), &file_name(id)).unwrap();
    store.sync_names().unwrap();
    let open = || store.open(&file_name(id), Access::Write).unwrap();

    let disk = Disk::open(open(), &NoParents, &Options::default()).unwrap();
    let data: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    let data = &data[..512 * 1500];
    disk.write(0, 40 << 20, data).unwrap();
    disk.write(0, 512, &[7; 1024]).unwrap();
    for i in 0..3000 {
        disk.write(0, i * 8192, &[3; 512]).unwrap();
        if i % 7 == 0 {
            disk.flush().unwrap();
        }
    }
    disk.discard(0, 40 << 20, 65536).unwrap();
    let check = |disk: &Disk| {
        let mut buf = vec![1; data.len()];
        disk.read(0, 40 << 20, &mut buf).unwrap();
        assert!(buf[..65536].iter().all(|b| *b == 0));
        assert_eq!(buf[65536..], data[65536..]);
        let mut buf = [1; 2048];
        disk.read(0, 0, &mut buf).unwrap();
        assert_eq!((buf[0], buf[511], buf[512], buf[1535], buf[1536]), (3, 3, 7, 7, 0));
    };
    check(&disk);
    drop(disk);
    let disk = Disk::open(open(), &NoParents, &Options::default()).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
    let disk = Disk::open(open(), &NoParents, &Options::default()).unwrap();
    assert!(disk.problems.is_empty());
    let again = disk.map().block(format::units::GuestBlock(0)).unwrap();
    assert!(!again.reads_zero());
    disk.seal(&mut |_, _| Ok(())).unwrap();
    assert_eq!(store.open(&file_name(id), Access::Write).err().unwrap().kind(), Kind::ReadOnly);
    let sealed = store.open(&file_name(id), Access::Read).unwrap();
    let disk = Disk::open_read_only(sealed, &NoParents, &Options::default()).unwrap();
    let facts = disk.facts().unwrap();
    assert_ne!(facts.superblock.digest, [0; 32]);
}
