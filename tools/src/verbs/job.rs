//! `job ls`, `watch` and `cancel`.

use blockd::api::types::{Job, JobState};
use blockd::pump::Watch as _;
use format::Error;

use super::Session;
use crate::cli::JobId;
use crate::output::{Outcome, Table, Verdict, utc};
use crate::progress::Progress;
use crate::size::show;

/// Milliseconds that one question waits for the end of a job.
const WAIT_MS: u64 = 200;

/// `job ls`
pub fn ls(s: &Session) -> Outcome {
    let jobs: Vec<Job> = s.need_daemon()?.get("/v1/jobs".into())?;
    let text = || {
        let head = ["ID", "KIND", "OBJECT", "STATE", "DONE", "OF", "STARTED"];
        let mut table = Table::new(&head, &[0, 4, 5]);
        for j in &jobs {
            table.row([
                j.id.to_string(),
                j.kind.name().into(),
                j.object.clone(),
                j.state.name().into(),
                show(j.done),
                j.total.map_or("-".into(), show),
                utc(j.started),
            ]);
        }
        table.render()
    };
    s.out.result(&jobs, text)?;
    Ok(Verdict::Done)
}

fn line(j: &Job) -> String {
    let (kind, state) = (j.kind.name(), j.state.name());
    format!("job {}, {kind} of {}: {state}, {} done", j.id, j.object, show(j.done))
}

/// `job watch`
pub fn watch(s: &Session, args: &JobId) -> Outcome {
    let client = s.need_daemon()?;
    let progress = Progress::new(s.out, "waiting");
    let job: Job = loop {
        let job: Job = client.get(format!("/v1/jobs/{}?wait_ms={WAIT_MS}", args.id))?;
        progress.set(job.done, job.total.unwrap_or(0));
        if job.state != JobState::Running {
            break job;
        }
    };
    drop(progress);
    match job.error.clone() {
        Some(failure) => Err(Error::from(failure).into()),
        None => {
            s.out.confirm(&job, || line(&job))?;
            Ok(Verdict::Done)
        }
    }
}

/// `job cancel`
pub fn cancel(s: &Session, args: &JobId) -> Outcome {
    let job: Job = s.need_daemon()?.delete(format!("/v1/jobs/{}", args.id))?;
    s.out.confirm(&job, || match job.state {
        JobState::Running => format!("job {} was asked to stop", job.id),
        _ => line(&job),
    })?;
    Ok(Verdict::Done)
}
