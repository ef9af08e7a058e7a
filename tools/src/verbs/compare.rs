//! `disk compare`.

use std::path::{Path, PathBuf};

use blockd::api::types::{Compare as Request, Compared, SessionUse};
use blockd::content::Content;
use blockd::store::Access;
use blockd::verbs::{Contents, compare as compare_contents, content_ranges};
use format::Result;

use super::Session;
use crate::cli::Compare;
use crate::image::Image;
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::store::Store;

/// Where an argument points, before anything is opened.
enum Named {
    Disk,
    File(PathBuf),
}

/// True for what cannot be the name of a disk.
fn is_path(arg: &str) -> bool {
    arg.starts_with("file:") || arg.contains('/')
}

fn named(arg: &str, store: Option<&dyn Store>) -> Result<Named> {
    let is_disk = !is_path(arg) && store.map_or(Ok(false), |store| store.has(arg))?;
    if is_path(arg) || (!is_disk && Path::new(arg).exists()) {
        return Ok(Named::File(arg.strip_prefix("file:").unwrap_or(arg).into()));
    }
    Ok(Named::Disk)
}

/// `disk compare`
pub fn compare(s: &Session, args: &Compare) -> Outcome {
    let names = [args.a.as_str(), args.b.as_str()];
    // Without a store, both may still be files.
    let may_be_disk = names.iter().any(|arg| !is_path(arg));
    let store = match may_be_disk && s.names_a_store() {
        true => Some(s.open(Access::Read)?),
        false => None,
    };
    let sides = [named(names[0], store.as_deref())?, named(names[1], store.as_deref())?];
    let progress = Progress::new(s.out, "comparing");
    let compared = match (&sides, store.as_deref()) {
        ([Named::Disk, Named::Disk], Some(store)) => {
            let request = Request {
                a: args.a.clone(),
                b: args.b.clone(),
                all: args.all,
                accept_lost_tail: args.tail.accept_lost_tail,
            };
            store.compare(&request, &progress)?
        }
        (_, store) => compare_sides(s, args, (&sides, store), &progress)?,
    };
    drop(progress);
    s.out.confirm(&compared, || render(&compared))?;
    Ok(if compared.identical { Verdict::Done } else { Verdict::Found })
}

/// Compares what is not two disks of one store.
fn compare_sides(
    s: &Session,
    args: &Compare,
    (sides, store): (&[Named; 2], Option<&dyn Store>),
    progress: &Progress,
) -> Result<Compared> {
    let open = |arg: &str, side: &Named| -> Result<Box<dyn Content + '_>> {
        match (side, store) {
            (Named::File(path), _) => Ok(Box::new(Image::open(path, args.format.named())?)),
            (Named::Disk, Some(store)) => {
                store.open(arg, SessionUse::Export, args.tail.accept_lost_tail)
            }
            (Named::Disk, None) => Err(s.store_path().expect_err("it was looked for")),
        }
    };
    let (a, b) = (open(&args.a, &sides[0])?, open(&args.b, &sides[1])?);
    let ranges = content_ranges(&*a, &*b);
    let contents = Contents { sides: [&*a, &*b], ranges };
    compare_contents([&args.a, &args.b], &contents, args.all, progress)
}

fn render(c: &Compared) -> String {
    let mut parts = Vec::new();
    if c.size_a != c.size_b {
        parts.push(format!("{} has {} bytes, {} has {}", c.a, c.size_a, c.b, c.size_b));
    }
    match c.first_difference {
        Some(offset) => parts.push(format!("the contents differ from byte {offset} on")),
        None if c.identical => parts.push("the contents are the same".into()),
        None => parts.push("the part that both have is the same".into()),
    }
    if let (Some(bytes), Some(blocks)) = (c.differing_bytes, c.differing_blocks) {
        parts.push(format!("{bytes} bytes in {blocks} blocks of 4 KiB differ"));
    }
    parts.join("\n")
}
