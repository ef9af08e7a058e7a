//! Children that inherit from disks at the end of random chains (D-c, D-d, D-g, D-j, D-k): up to
//! six deltas, empty ones and such that only zero or resize included, made by sealing and by live
//! forks. Each child holds, to the last byte, what its parent holds, under both rules for the base,
//! with the host sharing space between files and without. Two rules that are known to be wrong must
//! be caught by the same comparison.

use std::sync::Arc;

use blockd::check::{CheckOptions, check};
use blockd::diff;
use blockd::disk::Disk;
use blockd::pump::Unwatched;
use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::store::sim::{Image, SimStore};
use blockd::storedir::{
    BaseRule, ForkOf, InheritOptions, Inherited, NewDisk, OpenOptions, StoreDir, boot_id,
};
use format::entry::BlockState;
use format::limits::BLOCK;
use format::units::GuestBlock;
use format::{Kind, Result};
use offshoot_tests::mount::Mount;
use offshoot_tests::pattern;
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::store::Leftovers;

const MIB: u64 = 1 << 20;
const RULES: [BaseRule; 2] = [BaseRule::FirstNonempty, BaseRule::RootMerged];
const REPEAT: &str = "cargo test -p offshoot-tests --test inherit_chains";

fn options() -> OpenOptions {
    OpenOptions { access: Access::Write, cache: CacheMode::Auto, boot: boot_id() }
}

fn in_memory() -> StoreDir {
    let store = SimStore::without_log(Image::new());
    StoreDir::init_in(&store, None).unwrap();
    StoreDir::open_in(Arc::new(store), &options()).unwrap()
}

fn writing(dir: &StoreDir, name: &str, work: impl FnOnce(&Disk)) {
    let disk = dir.open_disk(name, Access::Write, &dir.disk_options()).unwrap();
    work(&disk);
    disk.close().unwrap();
}

fn reading(dir: &StoreDir, name: &str) -> Disk {
    dir.open_disk(name, Access::Read, &dir.disk_options()).unwrap()
}

fn read(dir: &StoreDir, name: &str) -> Vec<u8> {
    let disk = reading(dir, name);
    let mut bytes = vec![0xee; usize::try_from(disk.size()).unwrap()];
    disk.read(0, 0, &mut bytes).unwrap();
    bytes
}

/// What one layer of a chain does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layer {
    /// Nothing.
    Empty,
    /// Discards only.
    Zeroes,
    /// Another size, and perhaps another one after that.
    Resize,
    /// Writes and discards.
    Writes,
}

fn range(rng: &mut Rng, disk: &Disk, sectors_max: u64) -> (u64, u64) {
    let all = disk.size() / 512;
    let first = rng.below(all);
    (first, (1 + rng.below(sectors_max)).min(all - first))
}

fn discard(rng: &mut Rng, disk: &Disk) {
    let (first, count) = range(rng, disk, 600);
    disk.discard(0, first * 512, count * 512).unwrap();
}

fn put(rng: &mut Rng, disk: &Disk, tag: u32) {
    let longest = if rng.one_in(3) { 800 } else { 40 };
    let (first, count) = range(rng, disk, longest);
    disk.write(0, first * 512, &pattern::bytes(tag, first, count)).unwrap();
}

fn change(rng: &mut Rng, disk: &Disk, (layer, tag): (Layer, u32)) {
    match layer {
        Layer::Empty => {}
        Layer::Zeroes => (0..1 + rng.below(3)).for_each(|_| discard(rng, disk)),
        Layer::Resize => {
            for _ in 0..1 + rng.below(2) {
                disk.resize(MIB + rng.below(MIB / 512) * 512, true).unwrap();
            }
        }
        Layer::Writes => {
            for _ in 0..1 + rng.below(5) {
                match rng.below(4) {
                    0 => discard(rng, disk),
                    _ => put(rng, disk, tag),
                }
            }
        }
    }
}

/// A chain of disks `d0`, `d1`, …, each over the sealed one before; the last is not sealed. With
/// `forks`, some layers are live forks of it instead.
fn chain(rng: &mut Rng, dir: &StoreDir, forks: bool) -> String {
    let mut name = "d0".to_owned();
    dir.create(&NewDisk::root(&name, MIB + rng.below(MIB / 512) * 512)).unwrap();
    writing(dir, &name, |disk| {
        let sectors = disk.size() / 512;
        disk.write(0, 0, &pattern::bytes(1, 0, sectors)).unwrap();
        change(rng, disk, (Layer::Zeroes, 1));
    });
    for n in 1..=rng.below(7) {
        if forks && rng.one_in(3) {
            let sibling = format!("{name}-{n}");
            dir.fork(&[ForkOf { disk: name.clone(), children: vec![sibling] }]).unwrap();
        } else {
            dir.seal(&name, &mut |_, _| Ok(())).unwrap();
            let next = format!("d{n}");
            let parent = Some(std::mem::replace(&mut name, next.clone()));
            dir.create(&NewDisk { parent, ..NewDisk::root(&next, 0) }).unwrap();
        }
        let layers = [Layer::Empty, Layer::Zeroes, Layer::Resize, Layer::Writes, Layer::Writes];
        let layer = layers[usize::try_from(rng.below(5)).unwrap()];
        writing(dir, &name, |disk| change(rng, disk, (layer, u32::try_from(n).unwrap() + 1)));
    }
    name
}

fn inherit(dir: &StoreDir, parent: &str, child: &str, base: BaseRule) -> Inherited {
    let of = [ForkOf { disk: parent.into(), children: vec![child.into()] }];
    let options = InheritOptions { base, below: None };
    dir.inherit(&of, &options, &Unwatched).unwrap().expect("no threshold")
}

fn is_sound(dir: &StoreDir, name: &str) {
    let file = dir.segment_file(dir.disk(name).unwrap().segment, Access::Read).unwrap();
    let report = check(&file, dir, None, &CheckOptions::default()).unwrap();
    assert!(report.clean, "{name}: {:?}", report.problems);
}

/// One chain, both rules, and what comes after. Returns the bytes that the host shares.
fn try_chain(seed: u64, dir: &StoreDir) -> u64 {
    let mut rng = Rng::new(seed);
    let parent = chain(&mut rng, dir, true);
    let (row, content) = (dir.disk(&parent).unwrap(), read(dir, &parent));
    let is_root = row.parents.is_empty();
    let mut cloned = 0;
    for (rule, child) in RULES.into_iter().zip(["first", "merged"]) {
        let made = inherit(dir, &parent, child, rule);
        cloned += made.cloned;
        assert!(read(dir, child) == content, "seed {seed}: {rule:?} shows something else");
        is_sound(dir, child);
        let now = dir.disk(&parent).unwrap();
        assert_eq!((now.segment, &now.parents), (row.segment, &row.parents), "seed {seed}");
        let depth = made.children[0].parents.len();
        match (is_root, rule) {
            (true, _) => assert_eq!(made.children[0].parents, [row.segment]),
            (false, BaseRule::RootMerged) => assert_eq!(made.children[0].parents.len(), 1),
            (false, BaseRule::FirstNonempty) => assert!((1..=row.parents.len()).contains(&depth)),
        }
    }
    let writes = (Layer::Writes, 99);
    if is_root {
        let e = dir.open_disk(&parent, Access::Write, &dir.disk_options()).err().unwrap();
        assert_eq!(e.kind(), Kind::ReadOnly);
        assert_eq!(dir.remove(&parent).unwrap_err().kind(), Kind::InUse);
    } else {
        writing(dir, &parent, |disk| change(&mut rng, disk, writes));
        assert!(read(dir, "first") == content, "seed {seed}: a write to the parent shows");
        dir.remove(&parent).unwrap();
    }
    writing(dir, "merged", |disk| change(&mut rng, disk, writes));
    assert!(read(dir, "first") == content, "seed {seed}: a write to a sibling shows");
    // A child of the child, with what it was given and what it wrote.
    writing(dir, "first", |disk| change(&mut rng, disk, writes));
    let content = read(dir, "first");
    inherit(dir, "first", "second", BaseRule::FirstNonempty);
    let depth = |name: &str| dir.disk(name).unwrap().parents.len();
    assert!(read(dir, "second") == content && depth("second") <= depth("first"), "seed {seed}");
    cloned
}

#[test]
fn of_random_chains_copied() {
    let seed = seed(1);
    println!("repeat with OFFSHOOT_SEED={seed} {REPEAT}");
    for n in 0..if soak() { 2_000 } else { 60 } {
        assert_eq!(try_chain(seed + n, &in_memory()), 0, "nobody shares space in memory");
    }
}

#[test]
fn of_random_chains_shared_by_the_host() {
    let Some(mount) = Mount::xfs("of_random_chains_shared_by_the_host", 512 << 20) else { return };
    let seed = seed(1);
    println!("repeat with OFFSHOOT_SEED={seed} {REPEAT}");
    let mut cloned = 0;
    for n in 0..if soak() { 200 } else { 8 } {
        let path = mount.path().join(format!("store{n}"));
        StoreDir::init(&path, None).unwrap();
        let _leftovers = Leftovers(path.clone());
        let dir = StoreDir::open(&path, &options()).unwrap();
        cloned += try_chain(seed + n, &dir);
        drop(dir);
        std::fs::remove_dir_all(&path).unwrap();
    }
    println!("{cloned} bytes are shared");
    assert!(cloned > 0, "XFS shares space");
}

/// The ranges of `parent` that differ from `base`, in pieces: first byte, bytes, and whether the
/// data lies in the parent's own segment; `None` for zeroes.
fn pieces(parent: &Disk, base: &Disk) -> Vec<(u64, u64, Option<bool>)> {
    let mut found = Vec::new();
    let mut each = |offset: u64, len: u64| -> Result<()> {
        let (first, count) = (offset / BLOCK, len.div_ceil(BLOCK));
        parent.map().resolve(GuestBlock(first), count, &mut |piece| {
            let offset = piece.block.offset().0;
            let len = (piece.count * BLOCK).min(parent.size() - offset);
            let own = match piece.state {
                BlockState::Data { segment, .. } => Some(segment == parent.map().own()),
                _ => None,
            };
            found.push((offset, len, own));
            Ok(())
        })
    };
    diff::changed(parent, base, &mut |range| {
        let end = (range.offset + range.len).min(parent.size());
        if range.offset < end { each(range.offset, end - range.offset) } else { Ok(()) }
    })
    .unwrap();
    found
}

/// Fills a child of `base` with the pieces that `wanted` picks, as a rule that is wrong does.
fn wrong(
    dir: &StoreDir,
    (parent, base, child): (&str, &str, &str),
    wanted: impl Fn(Option<bool>) -> bool,
) {
    let new = NewDisk { parent: Some(base.into()), ..NewDisk::root(child, 0) };
    dir.create(&new).unwrap();
    let (from, below) = (reading(dir, parent), reading(dir, base));
    writing(dir, child, |disk| {
        disk.resize(from.size(), true).unwrap();
        for (offset, len, own) in pieces(&from, &below) {
            if !wanted(own) {
                continue;
            }
            if own.is_none() {
                disk.write_zeroes(0, offset, len, true).unwrap();
                continue;
            }
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            from.read(0, offset, &mut bytes).unwrap();
            disk.write(0, offset, &bytes).unwrap();
        }
    });
}

/// Negative controls: the root with the parent's own blocks alone, and the right base without the
/// zeroes. Both give other content on many of the chains on which the rules above never do; with
/// everything that differs, the same code gives the right one.
#[test]
fn wrong_rules_are_caught() {
    let seed = seed(1);
    println!("repeat with OFFSHOOT_SEED={seed} {REPEAT}");
    let (mut chains, mut own_only, mut no_zeroes) = (0, 0, 0);
    for n in 0..40 {
        let dir = in_memory();
        let parent = chain(&mut Rng::new(seed + n), &dir, false);
        if parent == "d0" {
            continue;
        }
        chains += 1;
        let content = read(&dir, &parent);
        let right = inherit(&dir, &parent, "right", BaseRule::FirstNonempty);
        let base = right.children[0].parents.last().copied();
        let base = dir.disks().into_iter().find(|row| Some(row.segment) == base).unwrap().name;
        wrong(&dir, (&parent, "d0", "own-only"), |own| own != Some(false));
        wrong(&dir, (&parent, &base, "no-zeroes"), |own| own.is_some());
        wrong(&dir, (&parent, &base, "everything"), |_| true);
        own_only += usize::from(read(&dir, "own-only") != content);
        no_zeroes += usize::from(read(&dir, "no-zeroes") != content);
        assert!(read(&dir, "everything") == content, "seed {}", seed + n);
    }
    println!("{chains} chains: {own_only} wrong with own blocks, {no_zeroes} without zeroes");
    assert!(own_only > chains / 5 && no_zeroes > chains / 5, "nobody noticed");
}

/// D-d: empty segments are stepped over, one that only zeroes something is not, and the root is the
/// base even if it is empty.
#[test]
fn the_base_is_the_first_that_is_not_empty() {
    for empty in 0..=3 {
        for layer in [Layer::Writes, Layer::Zeroes] {
            let (dir, mut rng) = (in_memory(), Rng::new(empty));
            dir.create(&NewDisk::root("root", MIB)).unwrap();
            writing(&dir, "root", |disk| put(&mut rng, disk, 1));
            let mut last = "root".to_owned();
            let mut over = |name: &str| {
                dir.seal(&last, &mut |_, _| Ok(())).unwrap();
                let parent = Some(std::mem::replace(&mut last, name.to_owned()));
                dir.create(&NewDisk { parent, ..NewDisk::root(name, 0) }).unwrap();
                // Opened and closed: that alone does not make it anything but empty.
                writing(&dir, name, |_| ());
            };
            over("middle");
            writing(&dir, "middle", |disk| change(&mut rng, disk, (layer, 2)));
            (0..empty).for_each(|n| over(&format!("empty{n}")));
            over("vm");
            writing(&dir, "vm", |disk| put(&mut rng, disk, 3));

            inherit(&dir, "vm", "first", BaseRule::FirstNonempty);
            inherit(&dir, "vm", "merged", BaseRule::RootMerged);

            let segment = |name: &str| dir.disk(name).unwrap().segment;
            let parents = |name: &str| dir.disk(name).unwrap().parents;
            assert_eq!(parents("first"), [segment("root"), segment("middle")], "{layer:?}");
            assert_eq!(parents("merged"), [segment("root")]);
            assert!(read(&dir, "first") == read(&dir, "vm"));
            assert!(read(&dir, "merged") == read(&dir, "vm"));
        }
    }
    let dir = in_memory();
    dir.create(&NewDisk::root("root", MIB)).unwrap();
    dir.seal("root", &mut |_, _| Ok(())).unwrap();
    dir.create(&NewDisk { parent: Some("root".into()), ..NewDisk::root("vm", 0) }).unwrap();
    inherit(&dir, "vm", "child", BaseRule::FirstNonempty);
    assert_eq!(dir.disk("child").unwrap().parents, [dir.disk("root").unwrap().segment]);
}
