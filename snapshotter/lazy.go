package snapshotter

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"lazuli/fs/rootfs"
)

// prepareLazy commits the layer that the labels are about, if it is lazy, and reports whether there is a committed snapshot of
// it now. An error means that the layer must not be unpacked either.
func (s *Snapshotter) prepareLazy(ctx context.Context, target, key, parent string, labels map[string]string, opts []snapshots.Opt) (bool, error) {
	q, ok := parseRequest(target, labels)
	if !ok {
		s.log.Debug("Prepare says nothing about the layer", "target", target)
		return false, nil
	}
	record, p, err := s.lazy(ctx, q)
	if err != nil {
		if ctx.Err() != nil {
			return false, err
		}
		// containerd may still be able to fetch all of it.
		s.fellBack(q, err)
		return false, nil
	}
	q.manifest = p.image.Digest // no label says it to who pulled by the tag
	release, err := s.node.Hold()
	if err != nil {
		return false, err
	}
	defer release()
	if err := s.node.Known(ctx, record); err != nil { // it may have been pruned since it was resolved
		s.fellBack(q, err)
		return false, nil
	}
	if there, err := s.agree(ctx, target, parent, record); there || err != nil {
		return there, err
	}
	// Another image may claim the same chain: what is not the same in truth has another name.
	sum := sha256.Sum256([]byte(parent))
	name := fmt.Sprintf("lazy/%s/%s/%x", target, record.ID, sum[:8])
	var snap storage.Snapshot
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if snap, err = storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent, opts...); err != nil {
			return err
		}
		l := &layer{}
		l.Layers = []rootfs.RecordLayer{record}
		if err := os.MkdirAll(s.dir(snap.ID), 0o711); err != nil {
			return err
		}
		if err := s.writeLayer(snap.ID, l); err != nil {
			return err
		}
		_, err = storage.CommitActive(ctx, key, name, snapshots.Usage{}, opts...)
		return err
	})
	if errdefs.IsAlreadyExists(err) { // another namespace was faster
		s.removeBehind(snap.ID)
		return true, nil
	}
	if err != nil {
		if snap.ID != "" {
			s.removeBehind(snap.ID)
		}
		return false, err
	}
	if q.top {
		if layers, ok := p.whole(ctx); ok {
			if err := s.noteImage(snap.ID, q, layers); err != nil {
				s.log.Warn("the record of an image", "image", q.ref.String(), "err", err)
			}
		} else if err := s.writeImage(labels, snap); err != nil { // some are ordinary
			s.log.Warn("the record of an image", "image", q.ref.String(), "err", err)
		}
	}
	return true, nil
}

// noteImage writes down that the snapshot is the top of an image, for who lists images.
func (s *Snapshotter) noteImage(id string, q request, layers []rootfs.RecordLayer) error {
	r := s.node.Chain(layers).Record()
	r.Reference, r.Used = q.ref.String(), time.Now().UTC()
	if q.manifest != (v1.Hash{}) {
		r.Digest = q.manifest.String()
	}
	return r.Write(s.dir(id, rootfs.ImageRecord))
}

// agree looks for a committed snapshot that is called target, on the same parent. If it is of the same
// layer, or was found to be what it is called, it is good for both. If nobody knows yet whether it is, it is found out now: one
// of the two lies, and the one that came first must not win by that.
func (s *Snapshotter) agree(ctx context.Context, target, parent string, record rootfs.RecordLayer) (there bool, err error) {
	type candidate struct {
		id, name string
		*layer
	}
	var list []candidate
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		filter := fmt.Sprintf("labels.%q==%s,parent==%q", snapshots.LabelSnapshotRef, target, parent)
		err := storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindCommitted || info.Labels[snapshots.LabelSnapshotRef] != target || info.Parent != parent {
				return nil
			}
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			if err == nil {
				list = append(list, candidate{id: id, name: info.Name})
			}
			return err
		}, filter)
		if errdefs.IsNotFound(err) { // there never was a snapshot
			return nil
		}
		return err
	})
	if err != nil {
		return false, err
	}
	for _, c := range list {
		if c.layer, err = s.readLayer(c.id); err != nil {
			return false, err
		}
		if c.Bad != "" {
			continue
		}
		if c.Verified || c.record().ID == record.ID {
			return true, nil
		}
		s.log.Warn("two images claim the same layer with different content: it is fetched to find out which of them lies", "layer", record.Digest, "and", c.record().Digest, "chain", target)
		err := s.verify(ctx, c.id, c.name, c.layer, s.node.VerifyDiffID)
		var lie *rootfs.ErrDiffID
		if err == nil {
			return true, nil
		}
		if !errors.As(err, &lie) && !errdefs.IsNotFound(err) { // it was removed meanwhile
			return false, fmt.Errorf("layer %s is claimed to be the same as layer %s, which is here and cannot be verified: %w", record.Digest, c.record().Digest, err)
		}
	}
	return false, nil
}
