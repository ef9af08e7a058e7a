//! `disk map`.

use std::io::{self, BufWriter, Write};

use blockd::api::types::MapRange;
use blockd::store::Access;
use serde::ser::{SerializeSeq as _, Serializer as _};

use super::Session;
use super::inspect::short;
use crate::cli::Name;
use crate::output::{Outcome, Verdict, wrote};
use crate::store::Store;

/// `disk map`
pub fn map(s: &Session, args: &Name) -> Outcome {
    let store = s.open(Access::Read)?;
    let mut out = BufWriter::new(io::stdout().lock());
    match s.out.json {
        true => print_json(&*store, args, &mut out)?,
        false => print_lines(&*store, args, &mut out)?,
    }
    wrote(out.flush()).map(|()| Verdict::Done)
}

fn print_json(store: &dyn Store, args: &Name, out: &mut impl Write) -> Outcome<()> {
    let mut json = serde_json::Serializer::pretty(&mut *out);
    // Begun with the first range: before it, a failure is all that is printed.
    let mut begins = Some(&mut json);
    let mut list = None;
    store.map(&args.name, args.tail.accept_lost_tail, &mut |range| {
        if let Some(json) = begins.take() {
            list = Some(wrote(json.serialize_seq(None).map_err(io::Error::from))?);
        }
        let element = list.as_mut().map(|list| list.serialize_element(&range));
        wrote(element.unwrap_or(Ok(())).map_err(io::Error::from))
    })?;
    if let Some(list) = list {
        wrote(list.end().map_err(io::Error::from))?;
    }
    wrote(writeln!(out))
}

fn print_lines(store: &dyn Store, args: &Name, out: &mut impl Write) -> Outcome<()> {
    let mut head = Some(());
    store.map(&args.name, args.tail.accept_lost_tail, &mut |range| {
        if head.take().is_some() {
            let head = ["OFFSET", "LENGTH", "STATE"];
            let [offset, length, state] = head;
            wrote(writeln!(out, "{offset:>18} {length:>18}  {state:<8}SEGMENT   FILE OFFSET"))?;
        }
        wrote(writeln!(out, "{}", line(&range)))
    })
}

fn line(r: &MapRange) -> String {
    let state = r.state.name();
    let place = match (r.segment, r.file_offset) {
        (Some(segment), Some(offset)) => format!("{}  {offset}", short(segment)),
        _ => String::new(),
    };
    format!("{:>18} {:>18}  {state:<8}{place}", r.offset, r.length).trim_end().to_owned()
}
