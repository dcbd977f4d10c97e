//! What a query says about its generation, on its way into the job.

use shared::{Generation, Job, Outcome, job_seed};

use crate::client::Listening;
use crate::template;

#[tokio::test]
async fn settings_of_posted_queries_go_into_their_jobs_before_those_of_the_run() {
    let listening = Listening::open().await;
    let body = r#"[
        {"id": "plain", "query": "q"},
        {"id": "own", "query": "q", "generation": {"max_tokens": 3, "stop": "END", "seed": 11}},
        {"id": "bad", "query": "q", "generation": {"top_p": 2}},
        {"id": "own", "query": "q", "generation": {"max_tokens": 3, "stop": "END", "seed": 11}},
        {"id": "own", "query": "q", "generation": {"max_tokens": 4}}
    ]"#;
    let answer = listening.post_with("", body).await;
    assert_eq!(answer.counts(), (202, 2, 1, 1), "{answer:?}");
    let conflict = answer.body["rejected"][0]["reason"].as_str().unwrap();
    assert!(conflict.contains("already belongs"), "{conflict}");
    let jobs: Vec<Job> = listening.jobs.take().await;
    let plain =
        Generation { seed: Some(job_seed(7, &jobs[0].context.id)), ..template().generation };
    assert_eq!(jobs[0].generation, plain);
    let own = Generation {
        max_new_tokens: Some(3),
        stop: Some(vec!["END".to_owned()]),
        seed: Some(11),
        ..template().generation
    };
    assert_eq!(jobs[1].generation, own);
    // It is said once, in the job.
    assert!(jobs[1].context.generation.is_empty());
    let failed = listening.outcomes.take().await;
    let reason = "field `generation`: top_p: expected a number above 0 and at most 1, given 2";
    assert_eq!(failed[0].outcome, Outcome::Failed(reason.to_owned()));
}
