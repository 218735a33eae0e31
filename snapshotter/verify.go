package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"lazuli/fs/rootfs"
)

const (
	// verifyEvery is how often it is looked for layers that have arrived whole.
	verifyEvery = 30 * time.Second
	// What could not be verified is tried again after verifyEvery, and then after twice as long each time: it may take the whole blob.
	lastVerify = time.Hour
)

// verifyLoop verifies the diffIDs of lazy layers of which everything has arrived.
func (s *Snapshotter) verifyLoop() {
	tick := time.NewTicker(verifyEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.Verify(s.ctx, false); err != nil && s.ctx.Err() == nil {
			s.log.Warn("verifying layers", "err", err)
		}
	}
}

// Verify compares the layers that have arrived whole with what their images claim, or with all set every lazy layer, whose
// blobs are then read from beginning to end. Each is verified once. A lie is not an error of Verify: the
// snapshot is marked, and nothing starts from it any more.
func (s *Snapshotter) Verify(ctx context.Context, all bool) error {
	var errs []error
	err := s.each(ctx, func(id string, info snapshots.Info) error {
		if info.Kind != snapshots.KindCommitted || ctx.Err() != nil {
			return context.Cause(ctx)
		}
		l, err := s.readLayer(id)
		if err != nil {
			return nil // it is being removed
		}
		if l.Verified || l.Bad != "" || !all && !s.node.Complete(l.record()) {
			return nil
		}
		switch {
		case all:
			err = s.verify(ctx, id, info.Name, l, s.node.VerifyDiffID)
		case s.verifiable(id):
			err = s.verifyOnce(ctx, id, info.Name, s.node.VerifyDiffID)
		}
		if !settled(err) {
			errs = append(errs, err)
		}
		return nil
	})
	return errors.Join(append(errs, err)...)
}

// settled reports whether an error of verify's says that there is nothing to find out any more.
func settled(err error) bool {
	var lie *rootfs.ErrDiffID
	return err == nil || errors.As(err, &lie) || errdefs.IsNotFound(err)
}

// A verification is one that is under way, or came to nothing.
type verification struct {
	busy     bool
	failures int
	again    time.Time // not before
}

// verifiable reports whether it is time to verify a layer.
func (s *Snapshotter) verifiable(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.verifies[id]
	return v == nil || !time.Now().Before(v.again)
}

// verifyOnce is verify of a layer that may be verified already, unless somebody is at it.
func (s *Snapshotter) verifyOnce(ctx context.Context, id, name string, read func(context.Context, rootfs.RecordLayer) error) error {
	s.mu.Lock()
	v := s.verifies[id]
	if v == nil {
		v = &verification{}
		s.verifies[id] = v
	}
	if v.busy {
		s.mu.Unlock()
		return nil
	}
	v.busy = true
	s.mu.Unlock()
	var err error
	l, lerr := s.readLayer(id)
	if lerr == nil && !l.Verified && l.Bad == "" { // else it is being removed, or somebody was faster
		err = s.verify(ctx, id, name, l, read)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v.busy = false
	switch {
	case settled(err):
		delete(s.verifies, id)
	case ctx.Err() == nil:
		v.again = time.Now().Add(min(verifyEvery<<min(v.failures, 10), lastVerify))
		v.failures++
	}
	return err
}

// verifyFilled is the snapshotter's [rootfs.Verifier]: what is found out holds for all snapshots of the layer that claim the same.
func (s *Snapshotter) verifyFilled(ctx context.Context, r rootfs.RecordLayer, read func(context.Context, rootfs.RecordLayer) error) error {
	var claimed string
	var outcome error
	once := func(ctx context.Context, r rootfs.RecordLayer) error {
		if claimed == "" {
			claimed, outcome = r.DiffID, read(ctx, r)
		}
		if claimed != r.DiffID {
			return errAnotherClaim
		}
		return outcome
	}
	var errs []error
	err := s.each(ctx, func(id string, info snapshots.Info) error {
		if info.Kind != snapshots.KindCommitted || ctx.Err() != nil {
			return context.Cause(ctx)
		}
		l, err := s.readLayer(id)
		if err != nil || l.Verified || l.Bad != "" || l.record().ID != r.ID || l.record().Digest != r.Digest {
			return nil
		}
		if err := s.verifyOnce(ctx, id, info.Name, once); err != nil {
			errs = append(errs, err)
		}
		return nil
	})
	return errors.Join(append(errs, err)...)
}

// errAnotherClaim is no outcome: the layer is read again for that claim when all of it is here.
var errAnotherClaim = errors.New("another snapshot of the layer, which claims another diffID, was verified first")

// verify has all of a layer read, by [rootfs.Node.VerifyDiffID] or what does the same, which compares its diffID with the one that is
// claimed, and writes down what came of it. The error is a *rootfs.ErrDiffID if it was a lie, and wraps errdefs.ErrNotFound if the snapshot was removed meanwhile.
func (s *Snapshotter) verify(ctx context.Context, id, name string, l *layer, read func(context.Context, rootfs.RecordLayer) error) error {
	r := l.record()
	var err error
	if r.DiffID == "" {
		r.DiffID, err = s.node.ClaimedDiffID(ctx, r)
		l.Layers[0] = r
	}
	if err == nil {
		err = read(ctx, r)
	}
	var lie *rootfs.ErrDiffID
	switch {
	case errors.As(err, &lie):
		l.Bad = lie.Error()
		s.log.Error("an image lies about a layer: nothing starts from it any more", "image", r.Reference, "snapshot", name, "err", err)
	case err != nil:
		return err
	default:
		l.Verified = true
	}
	if werr := s.writeLayer(id, l); errors.Is(werr, fs.ErrNotExist) {
		return fmt.Errorf("snapshot %s: %w", name, errdefs.ErrNotFound)
	} else if werr != nil {
		return werr
	}
	if lie == nil {
		return nil
	}
	// Whoever looks for the chain by its name must not find this one.
	return errors.Join(err, s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return err
		}
		delete(info.Labels, snapshots.LabelSnapshotRef)
		if info.Labels == nil {
			info.Labels = map[string]string{}
		}
		info.Labels["lazuli.bad"] = fmt.Sprintf("%.300s", lie.Error())
		_, err = storage.UpdateInfo(ctx, info, "labels")
		return err
	}))
}

// A Bad is a snapshot that nothing starts from any more.
type Bad struct {
	Image string `json:"image"`
	Layer string `json:"layer"`
	Why   string `json:"why"`
}

// A Mounted is an active snapshot or view whose root is mounted.
type Mounted struct {
	Key   string `json:"key"`
	Dir   string `json:"dir"`
	Chain string `json:"chain"` // names its metadata image
	// Served says that what is not here can be had. It is not after the connection to the kernel was lost.
	Served bool `json:"served"`
}

// Status returns what is mounted and what is known to be bad.
func (s *Snapshotter) Status(ctx context.Context) (mounted []Mounted, bad []Bad, err error) {
	device, err := s.node.ServerDevice()
	if err != nil {
		return nil, nil, err
	}
	err = s.each(ctx, func(id string, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted {
			if l, err := s.readLayer(id); err == nil && l.Bad != "" {
				bad = append(bad, Bad{l.record().Reference, l.record().Digest, l.Bad})
			}
			return nil
		}
		r, err := rootfs.ReadRecord(s.dir(id, rootFile))
		if err != nil {
			return nil // it has no parent, or is being removed
		}
		b, _ := os.ReadFile(s.dir(id, serverFile))
		mounted = append(mounted, Mounted{Key: info.Name, Dir: s.dir(id, "rootfs"), Chain: r.Chain, Served: string(b) == strconv.FormatUint(device, 10)})
		return nil
	})
	return mounted, bad, err
}

// Fallbacks returns the layers that were last left to containerd to unpack.
func (s *Snapshotter) Fallbacks() []Fallback {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.fallback)
}
