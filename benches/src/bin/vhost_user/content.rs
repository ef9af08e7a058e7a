//! What the servers serve: the same bytes in our store and in the peer's files, all of it in the
//! page cache.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{NewDisk, OpenOptions, StoreDir, boot_id};
use rustix::fs::Advice;

/// Bytes of the disk without a parent.
pub const SPAN: u64 = 512 << 20;
/// Bytes of the parent that first writes go over.
pub const BASE: u64 = 2 << 30;
/// Bytes of the disks of chains.
pub const CHAIN: u64 = 256 << 20;
const EXTENT: u64 = 64 << 10;

/// Opens a store for writing.
pub fn store_at(path: &Path, cache: CacheMode) -> StoreDir {
    let how = OpenOptions { access: Access::Write, cache, boot: boot_id() };
    StoreDir::open(path, &how).expect("the store opens")
}

/// The same bytes twice: as a disk of a store of its own, and as a raw file.
pub struct Pair {
    /// Folder of both, for sockets and for what is made on the way.
    pub dir: PathBuf,
    /// Folder of the store.
    pub store: PathBuf,
    /// The raw file.
    pub raw: PathBuf,
}

/// A pair of `size` bytes in a folder of `dir` with the name of the disk, unless it is there.
pub fn pair(dir: &Path, name: &str, size: u64, seal: bool) -> Pair {
    let dir = dir.join(name);
    let pair = Pair { store: dir.join("store"), raw: dir.join("raw.img"), dir };
    if pair.raw.exists() {
        return pair;
    }
    std::fs::create_dir_all(&pair.dir).expect("a folder");
    StoreDir::init(&pair.store, None).expect("a new store");
    let open = store_at(&pair.store, CacheMode::Auto);
    let import = open.import(&NewDisk::root(name, size), 1).expect("a new disk");
    let bytes = vec![0x5a; 1 << 20];
    (0..size >> 20).for_each(|i| import.disk().write(0, i << 20, &bytes).expect("space"));
    import.finish().expect("an import");
    if seal {
        open.seal(name, &mut |_, _| Ok(())).expect("a seal");
    }
    // Made under another name, so that a run that was stopped leaves nothing that looks whole.
    let unfinished = pair.dir.join("raw.part");
    let mut file = std::fs::File::create(&unfinished).expect("a file");
    let content = std::io::Read::take(std::io::repeat(0x5a), size);
    std::io::copy(&mut { content }, &mut file).expect("space");
    file.sync_all().expect("a sync");
    std::fs::rename(unfinished, &pair.raw).expect("a new name");
    pair
}

fn files(places: &[&Path]) -> Vec<PathBuf> {
    let inside = |place: &Path| -> Vec<PathBuf> {
        match std::fs::read_dir(place) {
            Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
            Err(_) => vec![place.to_path_buf()],
        }
    };
    places.iter().flat_map(|place| inside(place)).collect()
}

/// Puts files, and the files of folders, into the page cache in the same way, whichever way they
/// were written, and whatever direct I/O has left of them there: as single pages, which is what
/// [`Advice::Random`] makes of them. What the host reads ahead is there in pieces of up to 2 MiB,
/// and ext4 takes some ten times as long to write 4 KiB into one of those.
///
/// To be called when the server has opened the disk: ours forgets what is cached of one whose last
/// server was killed, and where it has read a little, the host's mark for more of it turns a
/// reader's advice into nothing.
pub fn warm(places: &[&Path]) {
    for path in files(places) {
        let file = File::open(path).expect("a file");
        file.sync_all().expect("a sync");
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).expect("advice");
        rustix::fs::fadvise(&file, 0, None, Advice::Random).expect("advice");
        read(file);
    }
}

fn read(mut file: File) {
    std::io::copy(&mut file, &mut std::io::sink()).expect("a readable file");
}

/// Reads files, and the files of folders: what is in the page cache stays there.
pub fn keep_warm(places: &[&Path]) {
    for path in files(places) {
        read(File::open(path).expect("a file"));
    }
}

fn run(program: &str, args: &[String]) {
    let status = Command::new(program).args(args).status();
    assert!(status.is_ok_and(|s| s.success()), "{program} {args:?}");
}

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn make_anew(store: &Path, new: &NewDisk) {
    let open = store_at(store, CacheMode::Auto);
    let _ = open.remove(&new.name);
    open.create(new).expect("a new disk");
}

/// Our disk `holes`: nothing but holes.
pub fn holes(store: &Path) {
    make_anew(store, &NewDisk::root("holes", SPAN));
}

/// Our disk `child` over the base, made anew.
pub fn child(store: &Path) {
    make_anew(store, &NewDisk { parent: Some("base".into()), ..NewDisk::root("child", BASE) });
}

/// The peer's overlay over the raw file, made anew.
pub fn overlay(dir: &Path, raw: &Path, options: &str) -> PathBuf {
    let top = dir.join("overlay.qcow2");
    let _ = std::fs::remove_file(&top);
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-o", options, "-b"];
    let args = [strings(&create), strings(&[text(raw), text(&top)])].concat();
    run("qemu-img", &args);
    top
}

/// A store whose disk `top` stands on `depth` sealed ones that share the extents between them. At
/// depth 0 `top` holds everything itself.
pub fn own_chain(dir: &Path, depth: u64) -> PathBuf {
    let path = dir.join(format!("chain{depth}"));
    std::fs::create_dir(&path).expect("a folder");
    let open = offshoot_benches::new_store(&path).expect("a new store");
    let top = offshoot_benches::chain(&open, depth, CHAIN).expect("a chain");
    if depth == 0 {
        let bytes = vec![1; 1 << 20];
        (0..CHAIN >> 20).for_each(|i| top.write(0, i << 20, &bytes).expect("space"));
    }
    top.close().expect("a clean close");
    drop(open);
    warm(&[&path]);
    path
}

/// The same as qcow2 files, the top one first.
pub fn qcow2_chain(dir: &Path, depth: u64) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = Vec::new();
    let size = CHAIN.to_string();
    for layer in 0..=depth {
        let path = dir.join(format!("chain{depth}-{layer}.qcow2"));
        let below = files.first().map(|below| ["-F", "qcow2", "-b", text(below)]);
        let mut args = strings(&["create", "-q", "-f", "qcow2"]);
        args.extend(below.iter().flatten().map(|arg| (*arg).to_owned()));
        args.extend(strings(&[text(&path), &size]));
        run("qemu-img", &args);
        if layer < depth || depth == 0 {
            let step = usize::try_from(depth.max(1)).expect("a depth");
            let places = (layer * EXTENT..CHAIN).step_by(step * 65_536);
            let writes = places.flat_map(|at| ["-c".into(), format!("write -q {at} {EXTENT}")]);
            let args = writes.chain(strings(&["-f", "qcow2", text(&path)]));
            run("qemu-io", &args.collect::<Vec<String>>());
        }
        files.insert(0, path);
    }
    warm(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>());
    files
}
