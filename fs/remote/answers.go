package remote

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	// mirrorTries is how often one request asks an endpoint that is not the last.
	mirrorTries = 2

	// mirrorWait bounds each, until the first bytes of a blob are here or all of a manifest: it is
	// what a dial takes at most, and a third of what a reader of the fetcher waits for an answer.
	mirrorWait = 10 * time.Second
)

// answers are what the endpoints said to one request.
type answers struct {
	r    *registry
	w    *want
	said []answer // as r.endpoints
	last int      // of the endpoints that may be asked: it has all of the patience
}

type answer struct {
	tries int
	err   error // the latest
}

// get asks one endpoint, and reads its answer or keeps it for its reader. Its context ends with cancel, which is called when
// nothing more is to be read.
type get = func(ctx context.Context, cancel context.CancelCauseFunc, e *endpoint) error

// fetch has get ask the endpoints, one after the other, until one has what w wants. What all refuse, and some may
// have later, is asked again as the registry's patience says.
func (r *registry) fetch(ctx context.Context, w *want, get get) error {
	a := &answers{r: r, w: w, said: make([]answer, len(r.endpoints)), last: -1}
	for i, e := range r.endpoints {
		if e.tags || !w.tag {
			a.last = i
		}
	}
	if a.last < 0 {
		return a.nobody()
	}
	return r.retry(ctx, w.what, func() error {
		for _, i := range a.order() {
			e := r.endpoints[i]
			err := a.ask(ctx, i, get)
			if err == nil {
				if w.blob != nil {
					w.blob.answeredBy(e)
				}
				return nil
			}
			a.said[i] = answer{a.said[i].tries + 1, err}
			if ctx.Err() != nil {
				return err
			}
			r.log.Debug("no answer", "what", w.what, "host", e.host, "error", err)
		}
		return a.sum()
	})
}

// ask has get ask one endpoint, and notes if it is silent.
func (a *answers) ask(ctx context.Context, i int, get get) error {
	outer, e := ctx, a.r.endpoints[i]
	ctx, cancel := context.WithCancelCause(ctx)
	if i != a.last {
		wait := time.AfterFunc(mirrorWait, func() { cancel(fmt.Errorf("%w for %v", errStalled, mirrorWait)) })
		defer wait.Stop()
	}
	err := get(ctx, cancel, e)
	cause := context.Cause(ctx)
	switch {
	case err == nil:
	case outer.Err() == nil && errors.Is(cause, errStalled):
		e.link.fail()
	case outer.Err() != nil && !errors.Is(context.Cause(outer), context.Canceled) && a.w.blob != nil:
		a.w.blob.brokenBy(e) // the caller did not go away, but waited too long: it will ask again
	}
	if err != nil && outer.Err() == nil && errors.Is(cause, errStalled) && !errors.Is(err, errStalled) {
		err = fmt.Errorf("%s: %s: %w", a.w.what, e.host, cause) // else it says "context canceled", and not why
	}
	return err
}

// order returns the endpoints to ask now: who answered for the blob last, then in the order of the file, at the end who is
// down or broke a stream of it.
func (a *answers) order() []int {
	var ranks [3][]int
	for i, e := range a.r.endpoints {
		rank := 1
		switch {
		case a.w.tag && !e.tags, a.said[i].tries > 0 && !a.again(i):
			continue
		case e.link.isDown():
			rank = 2
		case a.w.blob != nil:
			rank = a.w.blob.rank(e)
		}
		ranks[rank] = append(ranks[rank], i)
	}
	return slices.Concat(ranks[:]...)
}

// again reports whether an endpoint that gave no answer may give one later, and is to be asked for it.
func (a *answers) again(i int) bool {
	var t *transient
	return errors.As(a.said[i].err, &t) && (i == a.last || a.said[i].tries < mirrorTries)
}

// sum returns the error of all that were asked, transient if one is to be asked again.
func (a *answers) sum() error {
	var asked []int
	var after time.Duration
	again := false
	for i, s := range a.said {
		if s.tries == 0 {
			continue
		}
		asked = append(asked, i)
		var t *transient
		if errors.As(s.err, &t) && a.again(i) {
			if !again || t.after < after {
				after = t.after
			}
			again = true
		}
	}
	if len(asked) == 1 {
		return a.said[asked[0]].err
	}
	err := &refusals{what: a.w.what, last: a.said[a.last].err}
	for _, i := range asked {
		text := strings.TrimPrefix(a.said[i].err.Error(), a.w.what+": ")
		err.text = append(err.text, fmt.Sprintf("%s: %s", a.r.endpoints[i].host, text))
	}
	if again {
		return &transient{err: err, after: after}
	}
	return err
}

// nobody is the error if no endpoint may be asked.
func (a *answers) nobody() error {
	if len(a.r.endpoints) > 0 {
		return fmt.Errorf(`%s: %s names no host that may say what a tag means: add "resolve" to the capabilities of one that you trust to, or name the image by its digest`, a.w.what, a.r.from)
	}
	return fmt.Errorf(`%s: %s names no host that may be asked: add "pull" to the capabilities of one`, a.w.what, a.r.from)
}

// refusals are the errors of several endpoints.
type refusals struct {
	what string
	text []string
	last error // the upstream's: a mirror that has not got it yet does not mean that it is nowhere
}

func (r *refusals) Error() string {
	return fmt.Sprintf("%s: none of %d hosts has it: %s", r.what, len(r.text), strings.Join(r.text, "; "))
}

func (r *refusals) Unwrap() error { return r.last }
