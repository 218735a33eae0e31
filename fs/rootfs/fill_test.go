package rootfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A filling is a fills whose images take a while each.
type filling struct {
	*fills
	mu    sync.Mutex
	done  []string // in their order; "-name" for what was stopped
	begun map[string]int
	away  bool // the registry
	log   strings.Builder
}

func newFilling(t *testing.T) *filling {
	f := &filling{begun: map[string]int{}}
	f.fills = newFills(slog.New(slog.NewTextHandler(&f.log, nil)), func(ctx context.Context, use useLayers) error {
		_, _, err := use()
		name := err.Error() // so that one can tell them apart
		note := func(s string) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.done = append(f.done, s)
		}
		f.mu.Lock()
		f.begun[name]++
		away := f.away
		f.mu.Unlock()
		if away {
			return errors.New("no answer")
		}
		select {
		case <-time.After(time.Minute):
			note(name)
			return nil
		case <-ctx.Done():
			note("-" + name)
			return ctx.Err()
		}
	})
	return f
}

func (f *filling) start(name string) (stop func()) {
	return f.add(name, func() ([]fillLayer, func(), error) { return nil, nil, errors.New(name) })
}

func (f *filling) want(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Equal(f.done, want) {
		t.Errorf("%q, want %q", f.done, want)
	}
}

// What was started last is fetched first, also when another one has begun; what is here whole is not looked at again.
func TestFillsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFilling(t)
		defer f.close()
		f.start("a")
		f.start("b")
		stopC := f.start("c")
		f.want(t)
		time.Sleep(90 * time.Second)
		f.want(t, "c") // b has begun
		f.start("d")
		f.start("c") // another container of what is here
		time.Sleep(time.Hour)
		f.want(t, "c", "-b", "d", "b", "a")
		stopC()
		f.start("c")
		time.Sleep(time.Hour)
		f.want(t, "c", "-b", "d", "b", "a")
	})
}

// The fetching ends when the last container of an image is gone, and stop returns only then.
func TestFillsStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFilling(t)
		defer f.close()
		one, two := f.start("a"), f.start("a")
		synctest.Wait()
		one()
		one() // once more is nothing
		f.want(t)
		two()
		f.mu.Lock()
		if !slices.Equal(f.done, []string{"-a"}) {
			t.Errorf("%q when stop returned", f.done)
		}
		f.mu.Unlock()
		time.Sleep(time.Hour)
		f.want(t, "-a")
	})
}

// What cannot be had is tried again after pauses that grow, is said once, and keeps nobody else waiting.
func TestFillsRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFilling(t)
		defer f.close()
		f.away = true
		f.start("a")
		f.start("b")
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		for _, name := range []string{"a", "b"} {
			// After 0, 1, 3, 7, 15, 31, 63 minutes and then once an hour.
			if n := f.begun[name]; n < 25 || n > 32 {
				t.Errorf("%s was tried %d times in a day", name, n)
			}
			if n := strings.Count(f.log.String(), fmt.Sprintf("image=%s", name)); n != 1 {
				t.Errorf("%d log lines for %s", n, name)
			}
		}
		f.mu.Lock()
		f.away = false
		f.mu.Unlock()
		f.start("c")
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		slices.Sort(f.done)
		f.want(t, "a", "b", "c")
	})
}
