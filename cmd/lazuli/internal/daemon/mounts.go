package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"lazuli/fs/fetch"
	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
)

// mounts are the images that users mounted through the daemon (lazuli mount, lazuli run).
type mounts struct {
	mu sync.Mutex
	m  map[string]*mounted
}

// A mounted is one of them.
type mounted struct {
	*rootfs.Rootfs
	id     string
	owner  owner
	before fetch.Stats // of the daemon, when it began
	stop   context.CancelFunc
	done   chan struct{} // closed when it is unmounted
	err    error         // set before done is closed
}

// An owner is the process that a mount ends with. The zero value is none.
type owner struct {
	PID   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"` // when it began, so that another process with the same number is not taken for it
}

// start returns when a process began, in clock ticks since the boot: proc_pid_stat(5), field 22.
func start(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is too short", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

func (o owner) alive() bool {
	began, err := start(o.PID)
	return o.PID == 0 || err == nil && began == o.Start
}

func ownerFile(r *rootfs.Rootfs) string { return filepath.Join(r.Folder(), "owner") }

// adopt goes on with what the last daemon had mounted.
func (m *mounts) adopt(s *server) error {
	m.m = map[string]*mounted{}
	all, err := s.node.Adopt()
	if err != nil {
		return err
	}
	for _, r := range all {
		var o owner
		if b, err := os.ReadFile(ownerFile(r)); err == nil {
			fmt.Sscan(string(b), &o.PID, &o.Start)
		}
		m.add(s, r, o, false, fetch.Stats{})
	}
	return nil
}

// mount mounts an image for a user.
func (m *mounts) mount(ctx context.Context, s *server, ref remote.Reference, dir string, o owner, fill bool, mo rootfs.MountOptions) (*mounted, error) {
	before := s.node.QueueStats()
	r, err := s.node.Mount(ctx, ref, dir, mo)
	if err != nil {
		return nil, err
	}
	if o.PID != 0 {
		if err := os.WriteFile(ownerFile(r), fmt.Append(nil, o.PID, o.Start), 0o600); err != nil {
			return nil, errors.Join(err, r.Close())
		}
	}
	return m.add(s, r, o, fill, before), nil
}

// add keeps an eye on a mount: it ends when somebody unmounts it or its owner is gone.
func (m *mounts) add(s *server, r *rootfs.Rootfs, o owner, fill bool, before fetch.Stats) *mounted {
	ctx, cancel := context.WithCancel(context.Background())
	x := &mounted{Rootfs: r, id: filepath.Base(r.Folder()), owner: o, before: before, stop: cancel, done: make(chan struct{})}
	m.mu.Lock()
	m.m[x.id] = x
	m.mu.Unlock()
	var filling sync.WaitGroup
	if fill {
		filling.Go(func() {
			if err := r.Fill(ctx); err != nil && ctx.Err() == nil {
				s.log.Warn("fetching the rest of the image", "image", r.Reference(), "err", err)
			}
		})
	}
	stopFill := r.FillBehind()
	go func() {
		defer close(x.done)
		waitOrphan(ctx, cancel, r, o)
		cancel()
		filling.Wait()
		stopFill()
		x.err = r.Close()
		m.mu.Lock()
		delete(m.m, x.id)
		m.mu.Unlock()
		if x.err != nil {
			s.log.Error("unmounting", "image", r.Reference(), "dir", r.Dir, "err", x.err)
		}
	}()
	return x
}

// waitOrphan returns when r is not mounted any more, when ctx ends, or when the owner is gone.
func waitOrphan(ctx context.Context, cancel context.CancelFunc, r *rootfs.Rootfs, o owner) {
	if o.PID != 0 {
		go func() { // ends with ctx
			tick := time.NewTicker(time.Second)
			defer tick.Stop()
			for o.alive() {
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
			}
			cancel()
		}()
	}
	r.Wait(ctx) // an error is that mounts cannot be watched: then it ends with the daemon
}

// unmount ends a mount and waits for it.
func (m *mounts) unmount(id string) error {
	m.mu.Lock()
	x := m.m[id]
	m.mu.Unlock()
	if x == nil {
		return fmt.Errorf("no mount %s", id)
	}
	x.stop()
	<-x.done
	return x.err
}

func (m *mounts) list() []*mounted {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []*mounted
	for _, x := range m.m {
		all = append(all, x)
	}
	slices.SortFunc(all, func(a, b *mounted) int { return strings.Compare(a.Dir, b.Dir) })
	return all
}
